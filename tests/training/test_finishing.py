"""The end of training: after a kill at any moment the same command resumes, and repeats no update of a checkpoint."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import config_of
from object_store import S3Server, error, serve
from safetensors.torch import save_file

from cdpo_ray.cost.gpus import DEFAULT_GPU
from cdpo_ray.errors import StoreError
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.records import COMMITS_DIR, TRAINING
from cdpo_ray.run import perform_step
from cdpo_ray.steps import STEPS, Context
from cdpo_ray.store import RunFolder, copy_tree, delete, files_within, read_bytes
from cdpo_ray.training.commits import Commits, names_of, newest_of, state_of
from cdpo_ray.training.trainer import write_history

NUM_UPDATES = 2
CHANGES = ("open", "fsync", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link")
PRODUCTS = {"manifest.json", "stages.json", "updates.jsonl", "lora/adapter.safetensors"}


def give_command(run: RunFolder, *, num_updates: int = NUM_UPDATES) -> list[int]:
    """Train as the real step does, with its own checkpoints and files; returns the updates of this call.

    Args:
        num_updates: total number of updates after which it is interrupted.
    """
    made: list[int] = []

    def perform(context: Context, output_dir: Path, output: Any) -> None:
        commits = Commits(output_dir / COMMITS_DIR, keep_last=1, device=torch.device("cpu"))
        newest = commits.newest(lambda line: None)
        saved = state_of(newest) if newest else {"state": {"num_updates": 0, "records": []}, "summaries": []}
        for number in range(saved["state"]["num_updates"] + 1, NUM_UPDATES + 1):
            made.append(number)
            records = [*saved["state"]["records"], {"update": number, "loss": 1 / number}]
            saved = {"state": {"num_updates": number, "records": records}, "summaries": [{"stage": 1}]}
            commits.write(number, saved, [("weight", torch.full((3,), float(number)))])
            if number == num_updates < NUM_UPDATES:
                raise KeyboardInterrupt
        written = Path(context.config.run.dir) / "elsewhere" / "lora"
        written.mkdir(parents=True, exist_ok=True)
        save_file({"weight": torch.full((3,), float(NUM_UPDATES))}, written / "adapter.safetensors")
        copy_tree(written.parent, output_dir)
        write_history(saved, output_dir)

    step = next(step for step in STEPS if step.folder == TRAINING)
    step = replace(step, settings=lambda config: {"beta": 1}, inputs=(), perform=perform)
    config = config_of(Path(os.environ["CDPO_TEST_DIR"]), "embedded")
    context = Context(config, PromptSplit([], [], 0), run)
    perform_step(step, context, start_ray=lambda: DEFAULT_GPU, allow_config_change=False)
    return made


class Killed(BaseException):
    """The process is dead: no further change reaches the disk."""


class Disk:
    """Changes of files below a folder, seen by an audit hook; one for all tests, because hooks cannot be removed.

    Attributes:
        moments: attempted changes.
        last: number of changes after which the process counts as dead.
    """

    def __init__(self) -> None:
        self.folder, self.moments, self.last = "", list[str](), 0
        sys.addaudithook(self.watch)

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in CHANGES:
            return
        path = str(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # `rmtree` names files from an open folder
            path = f"{os.readlink(f'/proc/self/fd/{arguments[1]}')}/{path}"
        if not path.startswith(self.folder):
            return
        if event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.moments.append(f"{event} {path}")
            if len(self.moments) > self.last:
                raise Killed


@pytest.fixture(scope="module")
def disk() -> Disk:
    return Disk()


@contextlib.contextmanager
def killed_on_disk(number: int, path: Path, disk: Disk) -> Iterator[list[str]]:
    """Fail the ``number``-th change below ``path`` and all later ones; yields the attempted changes."""
    fsync = os.fsync

    def watched_fsync(descriptor: int) -> None:
        disk.watch("fsync", (os.readlink(f"/proc/self/fd/{descriptor}"),))
        fsync(descriptor)

    disk.folder, disk.moments, disk.last = str(path), [], number - 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", watched_fsync)
        try:
            yield disk.moments
        finally:
            disk.folder = ""


@contextlib.contextmanager
def killed_in_store(number: int, server: S3Server) -> Iterator[list[str]]:
    """Fail the ``number``-th request that changes the store and all later ones; yields the attempted requests."""
    moments: list[str] = []

    def fault(operation: str, key: str) -> Any:
        if operation in ("put", "copy", "post", "delete"):
            moments.append(f"{operation} {key}")
            if len(moments) >= number:
                return error(403, "AccessDenied")
        return None

    server.fault = fault
    try:
        yield moments
    finally:
        server.fault = lambda operation, key: None


def assert_training_resumes_after_a_kill_at_every_moment(
    path_of: Callable[[int], Path], killed: Callable[[int, Path], contextlib.AbstractContextManager[list[str]]]
) -> None:
    quiet, started = RunFolder(path_of(-1)), RunFolder(path_of(0))
    assert give_command(quiet) == [1, 2]
    expected = {name: read_bytes(path) for name, path in files_within(quiet.path / TRAINING).items()}
    assert set(expected) == PRODUCTS
    with pytest.raises(KeyboardInterrupt):
        give_command(started, num_updates=1)
    number = num_after_training = 0
    while True:
        number += 1
        run = RunFolder(path_of(number))
        copy_tree(started.path, run.path)
        with killed(number, run.path) as moments, contextlib.suppress(Killed, StoreError):
            assert give_command(run) == [2]
        is_done, partial = run.has(TRAINING), run.path / f"{TRAINING}.partial"
        if not is_done:
            newest, _ = newest_of((partial if files_within(partial) else run.path / TRAINING) / COMMITS_DIR)
            assert newest, moments[-1]
            committed = state_of(newest)["state"]["num_updates"]
            num_after_training += committed == NUM_UPDATES
        assert give_command(run) == ([] if is_done or committed == NUM_UPDATES else [2]), moments[-1]
        found = {name: read_bytes(path) for name, path in files_within(run.path / TRAINING).items()}
        assert set(found) == PRODUCTS and not files_within(partial), moments[-1]
        assert all(found[name] == expected[name] for name in PRODUCTS - {"manifest.json"}), moments[-1]
        if len(moments) < number:
            assert num_after_training >= 4
            return


@pytest.mark.usefixtures("one_worker")
def test_fault_31_training_killed_at_any_moment_of_its_end_repeats_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    monkeypatch.setenv("CDPO_TEST_DIR", str(tmp_path / "beside"))
    assert_training_resumes_after_a_kill_at_every_moment(
        lambda number: tmp_path / f"run-{number}", lambda number, path: killed_on_disk(number, path, disk)
    )


@pytest.mark.nightly
@pytest.mark.usefixtures("one_worker")
def test_fault_31_training_in_a_bucket_killed_at_any_moment_of_its_end_repeats_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDPO_TEST_DIR", str(tmp_path))
    server = S3Server()
    with serve(server) as bucket:
        assert_training_resumes_after_a_kill_at_every_moment(
            lambda number: bucket / f"run-{number}", lambda number, path: killed_in_store(number, server)
        )
        delete(bucket)
    server.stop()


@pytest.mark.usefixtures("one_worker")
def test_fault_31_half_deleted_checkpoints_are_ignored_once_training_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDPO_TEST_DIR", str(tmp_path / "beside"))
    run = RunFolder(tmp_path / "run")
    give_command(run)
    half = run.path / TRAINING / COMMITS_DIR / "update-000002"
    half.mkdir(parents=True)
    (half / "state.json").write_text("{")
    (run.path / TRAINING / "settings.json").write_text("{}")
    assert give_command(run) == [] and names_of(run.path / TRAINING / COMMITS_DIR) == []
    assert set(files_within(run.path / TRAINING)) == PRODUCTS

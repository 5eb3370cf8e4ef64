"""Checkpoints of DeepSpeed engines in separate processes: resume, damage, truncation, full disk; without Ray."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cdpo_ray.config.training import LoraSection, TrainingSection
from cdpo_ray.errors import TrainingError
from cdpo_ray.models import load_model
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import StagePairs
from cdpo_ray.training.commits import Commits, fault_of, names_of, newest_of, state_of, tensors_of
from cdpo_ray.training.engine import restore_training, start_engine, training_tensors
from cdpo_ray.training.loop import Callbacks, Feed, TrainingState, train_stages
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.weight_copy import WeightCopy, averaging_share

CPU = torch.device("cpu")
GLOBAL_BATCH_SIZE, NUM_UPDATES, AVERAGE_DECAY = 4, 6, 0.6
LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}


def train(rank: int, num_workers: int, folder: Path, method: str, zero_stage: int, stop_after: int) -> None:
    """One worker of a group: resume from the newest checkpoint, train to ``stop_after`` updates, write a checkpoint."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_workers)}
    rendezvous = f"file://{folder}/group-{num_workers}-to-{stop_after}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=num_workers)
    model = load_model("stable_diffusion", path="embedded", device="cpu", for_training=True)
    lora = LoraSection(rank=4, targets=("to_q", "to_v")) if method == "lora" else None
    policy = make_policy(model, lora)
    section = TrainingSection(
        beta=200,
        learning_rate=LEARNING_RATE[method],
        global_batch_size=GLOBAL_BATCH_SIZE,
        empty_prompt_fraction=0.2,
        num_workers=num_workers,
        zero_stage=zero_stage,
        adaptive_beta=0.6,
        safeguard=0.9,
        ema_decay=AVERAGE_DECAY if method == "lora" and zero_stage < 3 else None,
    )
    engine = start_engine(model.denoiser, policy.trainable, section, num_workers=num_workers)
    numbers = torch.Generator().manual_seed(0)
    conditioning, _ = model.encode_prompts(["two red circles", "a blue square"])
    bank = SampleBank(torch.randn(2, 3, 4, 8, 8, generator=numbers), conditioning, np.arange(2))
    empty = {name: torch.zeros_like(value[:1]) for name, value in conditioning.items()}
    feed = Feed(bank, model.draw_times, empty, section, 7, rank, num_workers)
    draws = np.random.default_rng(0).integers(0, 2, 3 * GLOBAL_BATCH_SIZE)
    commits = Commits(folder, keep_last=2, device=engine.device)
    named = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
    average = WeightCopy("average", named) if section.ema_decay else None
    state = TrainingState()
    if newest := commits.newest(print):
        restore_training(engine, tensors_of(newest))
        state = TrainingState.of(state_of(newest))
        if average:
            average.restore(tensors_of(newest))

    def update_average(state: TrainingState) -> None:
        if average:
            average.approach(averaging_share(state.num_updates, AVERAGE_DECAY))

    def commit(state: TrainingState) -> None:
        averages = average.tensors() if average else ()
        commits.write(state.num_updates, asdict(state), itertools.chain(training_tensors(engine), averages))

    callbacks = Callbacks(
        lambda state: StagePairs(state.stage, draws, np.zeros_like(draws), np.full_like(draws, state.stage)),
        stops=itertools.chain([False] * (stop_after - state.num_updates - 1), itertools.repeat(True)).__next__,
        on_update=update_average,
        on_checkpoint=commit,
    )
    loss = partial(preference_loss, beta=section.beta)
    train_stages(engine, policy, feed, state, callbacks, num_stages=2, preference_loss=loss)
    torch.distributed.destroy_process_group()


def trained(folder: Path, *parts: tuple[int, int], method: str = "lora", zero_stage: int = 0) -> Path:
    """The last checkpoint of consecutive groups: (number of workers, total number of updates) each."""
    from worker_processes import run_workers  # here: scripts below import this module alone

    folder.mkdir()
    for num_workers, stop_after in parts:
        run_workers(train, num_workers, folder, method, zero_stage, stop_after, num_workers=num_workers)
    newest, faults = newest_of(folder)
    assert newest and not faults
    assert newest.name == f"update-{NUM_UPDATES:06d}"
    return newest


def tensors(commit: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(commit.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(
    ("method", "zero_stage"),
    [
        pytest.param(method, stage, marks=[] if (method, stage) == ("lora", 0) else pytest.mark.nightly)
        for method in LEARNING_RATE
        for stage in range(4)
    ],
)
def test_training_resumed_by_new_processes_ends_with_identical_tensors(
    tmp_path: Path, method: str, zero_stage: int
) -> None:
    """Stopped after a checkpoint within a stage."""
    train_in = partial(trained, method=method, zero_stage=zero_stage)
    quiet = train_in(tmp_path / "quiet", (2, NUM_UPDATES))
    broken = train_in(tmp_path / "broken", (2, 2), (2, NUM_UPDATES))
    expected, found = tensors(quiet), tensors(broken)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert state_of(quiet) == state_of(broken)
    moments = [value for name, value in expected.items() if name.startswith("exp_avg.")]
    averages = {name: value for name, value in expected.items() if name.startswith("average.")}
    if method == "lora" and zero_stage < 3:
        assert len(averages) == len(moments)
        assert any(not torch.equal(value, expected[name.removeprefix("average.")]) for name, value in averages.items())
    assert (
        len(moments) == (len(expected) - len(averages) - 1) / 3
        and max(float(value.abs().max()) for value in moments) > 0
    )


@pytest.mark.slow
@pytest.mark.usefixtures("embedded")
@pytest.mark.nightly
@pytest.mark.parametrize("workers", [(2, 1), (1, 2)])
def test_fault_14_another_number_of_workers_resumes_with_the_same_samples_and_stage(
    tmp_path: Path, workers: tuple[int, int]
) -> None:
    first, then = workers
    quiet = state_of(trained(tmp_path / "quiet", (first, NUM_UPDATES)))
    changed = state_of(trained(tmp_path / "changed", (first, 2), (then, NUM_UPDATES)))
    assert changed["stage"] == quiet["stage"] == 3
    for expected, found in zip(quiet["records"], changed["records"], strict=True):
        assert found["stage"] == expected["stage"]
        # Sums over one worker round differently from sums over two, and Adam amplifies that with every update.
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6 if found["update"] <= 3 else 2e-5)
        assert found["reference_error_w"] == pytest.approx(expected["reference_error_w"], abs=1e-6)


def numbers(number: int, size: int = 1000) -> list[tuple[str, Tensor]]:
    return [("weight", torch.full((size,), float(number))), ("step", torch.tensor(float(number)))]


def committed(folder: Path, *updates: int, keep_last: int = 3) -> Commits:
    commits = Commits(folder, keep_last=keep_last, device=CPU)
    for number in updates:
        commits.write(number, {"num_updates": number}, numbers(number))
    return commits


@pytest.mark.usefixtures("one_worker")
def test_only_the_last_checkpoints_are_kept_and_all_users_can_read_them(tmp_path: Path) -> None:
    committed(tmp_path, 5, 10, 15, 20, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["update-000015", "update-000020"]
    assert tensors_of(tmp_path / "update-000020")("weight")[0] == 20
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "update-000020").iterdir()} == {0o644}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


SHARE = "share-0-of-1.safetensors"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut short": (SHARE, cut_short, "share-0-of-1.safetensors: was altered (its size differs)"),
    "a bit flipped": (SHARE, flip_one_bit, "share-0-of-1.safetensors: was altered (its SHA-256 differs)"),
    "a share missing": (SHARE, Path.unlink, "share-0-of-1.safetensors: is missing"),
    "the state altered": ("state.json", flip_one_bit, "state.json: was altered (its SHA-256 differs)"),
    "no manifest": ("manifest.json", Path.unlink, "has no manifest.json"),
    "manifest cut short": ("manifest.json", cut_short, "manifest.json: is damaged"),
}


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_12_a_damaged_checkpoint_is_reported_and_the_newest_intact_one_is_used(
    tmp_path: Path, damage: str
) -> None:
    name, harm, message = DAMAGES[damage]
    commits = committed(tmp_path, 1, 2)
    harm(tmp_path / "update-000002" / name)
    lines: list[str] = []
    assert commits.newest(lines.append) == tmp_path / "update-000001"
    (line,) = lines
    assert message in line and "update-000002" in line and line.endswith("resuming from update-000001")
    committed(tmp_path, 2)  # written again over the damaged one
    assert commits.newest(lines.append) == tmp_path / "update-000002" and len(lines) == 1


@pytest.mark.usefixtures("one_worker")
def test_fault_12_without_an_intact_checkpoint_training_does_not_restart_silently(tmp_path: Path) -> None:
    commits = committed(tmp_path, 1, 2)
    for number in (1, 2):
        flip_one_bit(tmp_path / f"update-00000{number}" / SHARE)
    with pytest.raises(TrainingError, match=r"update-000002/share-0.*update-000001/share-0.*no checkpoint is intact"):
        commits.newest(lambda line: None)


KILLED_WHILE_WRITING = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_commits import KILL_POINTS, committed
from cdpo_ray.training import commits as module

def dying(call, after):
    def wrapped(*arguments, **options):
        if after:
            call(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    return wrapped

for name, (call, after, _) in KILL_POINTS.items():
    folder = Path({folder!r}) / name
    if os.fork() == 0:
        torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}.group", rank=0, world_size=1)
        committed(folder, 1)
        owner = Path if call == "rename" else module
        setattr(owner, call, dying(getattr(owner, call), after))
        committed(folder, 2)
    _, status = os.wait()
    assert os.WTERMSIG(status) == signal.SIGKILL, (name, status)
"""
KILL_POINTS = {
    "before the share": ("save_file", False, 1),
    "after it": ("copy", True, 1),
    "before the state": ("write_json", False, 1),
    "before the manifest": ("fingerprint_of", True, 1),
    "before the rename": ("rename", False, 1),
    "after the rename": ("rename", True, 2),
}
"""The call at which the process is killed, whether after it, and the newest checkpoint then."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    script = KILLED_WHILE_WRITING.format(tests=str(Path(__file__).parent), folder=str(folder))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("point", KILL_POINTS)
def test_fault_02_a_kill_at_any_point_leaves_the_previous_or_the_new_checkpoint_intact(
    killed: Path, point: str
) -> None:
    folder, expected = killed / point, KILL_POINTS[point][2]
    lines: list[str] = []
    commits = Commits(folder, keep_last=3, device=CPU)
    newest = commits.newest(lines.append)
    assert newest == folder / f"update-00000{expected}" and not lines
    assert tensors_of(newest)("weight")[0] == expected
    committed(folder, 2)
    assert names_of(folder)[0] == "update-000002" and fault_of(folder / "update-000002") is None
    assert not list(folder.glob("*.tmp"))


FULL_DISK = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_commits import CPU, Commits, committed, numbers, newest_of, tensors_of
from cdpo_ray.errors import StoreError

torch.distributed.init_process_group("gloo", init_method="file://{folder}.group", rank=0, world_size=1)
folder = Path({folder!r})
commits = committed(folder, 1)
try:
    commits.write(2, {{}}, numbers(2, size=2**18))
except StoreError as error:
    print(error)
newest, faults = newest_of(folder)
print(newest.name, faults, tensors_of(newest)("weight")[0].item())
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, to mount a small disk")
def test_fault_11_a_full_disk_is_reported_with_the_bytes_needed_and_the_previous_checkpoint_is_kept(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "commits"
    folder.mkdir()
    script = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(folder))
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3"', "sh",
         str(folder), sys.executable, script],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    error, newest = done.stdout.splitlines()
    assert str(folder / "update-000002") in error and "needs 1.0 MiB" in error and "MiB are free" in error
    assert newest == "update-000001 [] 1.0"

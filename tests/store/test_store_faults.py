"""Faults of the store: killed processes, full disks, two runs at once, missing storage."""

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finished_runs import config_of
from lock_holders import holder

from cdpo_ray.errors import StoreError
from cdpo_ray.run import run_steps
from cdpo_ray.steps import steps_of
from cdpo_ray.store import RunFolder, lock, storage_path

STEP = "1-samples"


def write_step(run: RunFolder, parts: tuple[str, ...] = ("a",), *, resumable: bool = False) -> None:
    """Write a step that grows by parts, one file each; a resumable one keeps existing files."""
    settings = dict.fromkeys(parts, 1)
    with run.writing(STEP, settings, {}, seed=0, resumable=resumable, grows=True) as (folder, output):
        for part in output.parts:
            if not (folder / part).exists():
                (folder / part).write_text(f"{part} of {os.getpid()}")


def is_complete(run: RunFolder, parts: tuple[str, ...]) -> bool:
    return run.is_complete(STEP, dict.fromkeys(parts, 1), {}, grows=True)


def dies_before(number: int, run: RunFolder, parts: tuple[str, ...], *, resumable: bool) -> bool:
    """Write a step in a child that is killed before its ``number``-th disk change; False: it made fewer."""
    child = os.fork()
    if child == 0:
        num_changes = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal num_changes
            writes = event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                num_changes += 1
                if num_changes == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            write_step(run, parts, resumable=resumable)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize("parts_there", [(), ("a",)])
def test_fault_02_a_step_killed_before_any_disk_change_is_complete_or_absent_and_can_be_run_again(
    tmp_path: Path, parts_there: tuple[str, ...], resumable: bool
) -> None:
    wanted, number = ("a", "b", "c"), 0
    while True:
        number += 1
        run = RunFolder(tmp_path / str(number))
        run.path.mkdir()
        if parts_there:
            write_step(run, parts_there)
        if not dies_before(number, run, wanted, resumable=resumable):
            break
        is_made = run.has(STEP) and is_complete(run, wanted)
        assert is_made or run.has(STEP) == bool(parts_there)
        assert not parts_there or is_complete(run, parts_there)
        written = {path.name: path.read_text() for path in run.path.rglob("[abc]")}
        if not is_made:
            write_step(run, wanted, resumable=resumable)
        assert is_complete(run, wanted)
        if is_made or (resumable and not parts_there):
            assert written.items() <= {name: (run.path / STEP / name).read_text() for name in wanted}.items()
    assert number > 6, "settings, files, manifest and renames are changes"


FULL_DISK = """
import os, pathlib, sys
from cdpo_ray.errors import StoreError
from cdpo_ray.store import RunFolder, refuse_full_disk
run = RunFolder(pathlib.Path(sys.argv[1]))
with run.writing("1-samples", {}, {}, seed=0, resumable=False) as (folder, _):
    (folder / "shard").write_bytes(bytes(200_000))
try:
    refuse_full_disk(run.path, 2_000_000)
except StoreError as error:
    print(error)
try:
    with run.writing("2-scores", {}, {}, seed=0, resumable=True) as (folder, _):
        with (folder / "shard").open("wb", buffering=0) as shard:
            while num_written := shard.write(bytes(4096)):
                if sys.argv[2] == "manifest" and os.statvfs(run.path).f_bavail == 0:
                    break
except StoreError as error:
    print(error)
assert run.is_complete("1-samples", {}, {}) and not run.has("2-scores")
(run.path / "2-scores.partial" / "shard").unlink()
with run.writing("2-scores", {}, {}, seed=0, resumable=True) as (folder, _):
    pass
assert run.is_complete("2-scores", {}, {})
print("continued")
"""


@pytest.mark.parametrize("what", ["shard", "manifest"])
def test_fault_11_a_full_disk_is_reported_with_needed_and_free_space_and_earlier_steps_stay(
    tmp_path: Path, what: str
) -> None:
    mount = f'mount -t tmpfs -o size=1m none "{tmp_path}" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh"]
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a private disk for a process (unshare -rm)")
    done = subprocess.run(
        [*command, sys.executable, "-c", FULL_DISK, str(tmp_path), what], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    refused, full, last = done.stdout.splitlines()
    assert refused.startswith(f"{tmp_path}: needs 1.9 MiB, but 0.8 MiB are free on its disk; free disk space")
    assert re.fullmatch(
        rf"{tmp_path}/2-scores\.partial(/manifest\.json)?: cannot be written.*: .*No space left on device;"
        r" 0\.0 MiB are free; free disk space, and run the same command again",
        full,
    )
    assert last == "continued"


KILLED_IN_STORE = """
import os, signal, sys
from cdpo_ray.store import RunFolder, storage_path
run = RunFolder(storage_path("s3://bucket/run"))
with run.writing("1-samples", {"a": 1}, {}, seed=0, resumable=True) as (folder, _):
    (folder / "whole").write_bytes(b"whole")
    cut_short = (folder / "cut_short").open("wb")
    cut_short.write(bytes(20 * 2**20))  # some parts of it are uploaded
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_fault_02_a_step_killed_during_an_upload_resumes_with_the_complete_objects(s3: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_STORE], check=False)
    assert killed.returncode == -signal.SIGKILL
    run = RunFolder(s3 / "run")
    assert not run.has(STEP)
    with run.writing(STEP, {"a": 1}, {}, seed=0, resumable=True):
        pass
    assert run.is_complete(STEP, {"a": 1}, {}) and set(run.manifest(STEP)["files"]) == {"whole"}


HOLD = """
import sys
from cdpo_ray.store import RunFolder, storage_path
with RunFolder(storage_path(sys.argv[1])).locked():
    print("here", flush=True); sys.stdin.read()
"""


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "run" if request.param == "disk" else request.getfixturevalue("s3") / "run"


def test_fault_17_a_second_run_is_refused_by_pid_and_host_until_the_first_has_been_killed(folder: Path) -> None:
    with holder(HOLD, folder) as process:
        message = (
            rf"run: another run is writing here \(pid {process.pid} on {platform.node()}.*\); wait for it, or choose"
        )
        with pytest.raises(StoreError, match=message), RunFolder(folder).locked():
            pytest.fail("two runs hold one folder")
    with RunFolder(folder).locked():
        pass
    with RunFolder(folder).locked():
        pass


def lock_from_elsewhere(folder: Path) -> Path:
    path = folder / lock.LOCK
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "id": "0"}))
    return path


def test_fault_17_a_lock_of_another_machine_is_taken_over_once_it_expires(
    s3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock_from_elsewhere(s3 / "run")
    with (
        pytest.raises(StoreError, match=r"\(pid 1 on elsewhere, \d s ago; its lock expires after 60 s\)"),
        RunFolder(s3 / "run").locked(),
    ):
        pytest.fail("two runs hold one folder")
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.0)
    with RunFolder(s3 / "run").locked():
        assert json.loads((s3 / "run" / lock.LOCK).read_bytes())["pid"] == os.getpid()
    assert s3.fs.find("bucket") == []


def test_fault_17_a_held_lock_is_renewed_and_its_loss_stops_the_run(s3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.2)
    path = s3 / "run" / lock.LOCK

    def lose_it() -> None:
        with RunFolder(s3 / "run").locked():
            made = s3.fs.modified(path.path)
            time.sleep(1.5)  # the store's clock ticks in seconds
            assert s3.fs.modified(path.path) > made
            for _ in range(60):  # a renewal may come in between
                lock_from_elsewhere(s3 / "run")
                time.sleep(0.5)

    with pytest.raises(KeyboardInterrupt):
        lose_it()
    assert json.loads(path.read_bytes())["host"] == "elsewhere", "another's lock is not deleted"


def refused_at_once(run_dir: str, caplog: pytest.LogCaptureFixture) -> str:
    """Error of a run that cannot write to its folder, raised before any work."""
    config = config_of(Path("unused"), "embedded", run={"dir": run_dir})
    started = time.monotonic()
    with pytest.raises(StoreError) as caught:
        run_steps(config, steps_of(config))
    assert time.monotonic() - started < 10  # a timeout of 3 s, and more on a busy machine
    assert "generate" not in caplog.text
    return str(caught.value)


def test_fault_18_a_disk_that_cannot_be_written_stops_a_run_at_once(caplog: pytest.LogCaptureFixture) -> None:
    assert "/proc/runs/tuned: cannot be written: No such file or directory" in refused_at_once("/proc/runs", caplog)


def test_fault_18_a_store_without_read_permission_is_not_mistaken_for_an_empty_one(
    s3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_step(RunFolder(s3 / "run"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3.fs.clear_instance_cache()
    with pytest.raises(StoreError, match=r"manifest\.json: cannot be read: Unable to locate credentials; check"):
        RunFolder(storage_path("s3://bucket/run")).has(STEP)
    s3.fs.clear_instance_cache()


def test_fault_18_a_missing_bucket_is_named_and_not_created(s3: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = refused_at_once("s3://no-such-bucket/runs", caplog)
    assert "s3://no-such-bucket/runs/tuned: cannot be written: The specified bucket does not exist; check" in message
    assert not storage_path("s3://no-such-bucket").exists()


def test_fault_18_a_store_that_does_not_answer_stops_a_run_in_seconds(
    s3: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        s3.fs.clear_instance_cache()
        message = refused_at_once("s3://bucket/runs", caplog)
    assert "s3://bucket/runs/tuned: the store did not answer in 3 s, or only with retryable errors" in message
    s3.fs.clear_instance_cache()

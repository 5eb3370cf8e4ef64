"""Disks without file locks: still only one run writes to a folder."""

import errno
import fcntl
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
from lock_holders import holder

from cdpo_ray.errors import StoreError
from cdpo_ray.store import NodeFolder, RunFolder, lock

NO_LOCKS = ("ENOSYS", "ENOLCK", "EOPNOTSUPP")
WITHOUT = """
import errno, fcntl, os, sys
from pathlib import Path
from cdpo_ray.store import RunFolder

def flock(descriptor, operation):
    raise OSError(getattr(errno, sys.argv[2]), "no locks here")

fcntl.flock = flock
with RunFolder(Path(sys.argv[1])).locked():
    print("here", flush=True); sys.stdin.read()
"""


def answer_of_flock(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def flock(descriptor: object, operation: int) -> None:
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("name", NO_LOCKS)
def test_fault_40_a_disk_without_locks_is_reported_and_locked_by_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    answer_of_flock(monkeypatch, name)
    for _ in range(2):
        with RunFolder(tmp_path).locked():
            assert json.loads((tmp_path / ".lock.held").read_bytes())["pid"] == os.getpid()
    assert sorted(os.listdir(tmp_path)) == [".lock"]
    assert f"{tmp_path}: its disk has no file locks" in caplog.text and caplog.text.count("no file locks") == 2


def test_fault_40_a_folder_of_a_node_may_be_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def as_on_nfs(file: Any, operation: int) -> None:
        """A shared lock needs a file that can be read, an exclusive one a file that can be written."""
        access = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if access not in (os.O_RDWR, os.O_RDONLY if operation & fcntl.LOCK_SH else os.O_WRONLY):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = NodeFolder("samples", "name")
    assert folder.path.is_dir()
    folder.delete()
    assert not folder.path.exists()


@pytest.mark.parametrize("name", NO_LOCKS[:1])
def test_fault_40_a_second_run_is_refused_until_the_first_has_been_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    answer_of_flock(monkeypatch, name)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    with holder(WITHOUT, tmp_path, name) as process:
        message = rf"another run is writing here \(pid {process.pid} on {platform.node()}, \d+ s ago"
        with pytest.raises(StoreError, match=message), RunFolder(tmp_path).locked():
            pytest.fail("two runs hold one folder")
    with RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize("content", [json.dumps({"pid": 1, "host": "elsewhere", "id": "0"}), "", "[1]", "\x00"])
def test_fault_40_a_lock_of_another_machine_or_an_unknown_holder_expires_without_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    answer_of_flock(monkeypatch, "ENOLCK")
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    (tmp_path / ".lock.held").write_text(content)
    with (
        pytest.raises(StoreError, match=r"\((pid 1 on elsewhere|unknown process), \d s ago; its lock expires"),
        RunFolder(tmp_path).locked(),
    ):
        pytest.fail("two runs hold one folder")
    hour_ago = time.time() - 3600
    os.utime(tmp_path / ".lock.held", (hour_ago, hour_ago))
    with RunFolder(tmp_path).locked():
        assert json.loads((tmp_path / ".lock.held").read_bytes())["pid"] == os.getpid()


def test_fault_40_the_file_is_renewed_and_its_loss_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_of_flock(monkeypatch, "EOPNOTSUPP")
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.02)
    path = tmp_path / ".lock.held"

    def lose_it() -> None:
        with RunFolder(tmp_path).locked():
            made = path.stat().st_mtime_ns
            path.unlink()  # deleted by hand: it is created again
            time.sleep(0.2)
            assert path.stat().st_mtime_ns > made
            for _ in range(100):  # a renewal may come in between
                path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "id": "0"}))
                time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        lose_it()
    assert f'"pid": {os.getpid()}' not in path.read_text(), "another's lock is not deleted"


@pytest.mark.parametrize("name", ["EWOULDBLOCK", "EAGAIN", "EACCES"])
def test_fault_40_a_lock_of_another_process_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / ".lock").write_text("pid 7 on elsewhere")
    answer_of_flock(monkeypatch, name)
    with (
        pytest.raises(StoreError, match=r"another run is writing here \(pid 7 on elsewhere\)"),
        RunFolder(tmp_path).locked(),
    ):
        pytest.fail("two runs hold one folder")


@pytest.mark.parametrize("name", ["EIO", "ESTALE"])
def test_fault_40_a_lock_that_fails_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    answer_of_flock(monkeypatch, name)
    reason = os.strerror(getattr(errno, name))
    with pytest.raises(StoreError, match=f"cannot be written: {reason}; check the disk"), RunFolder(tmp_path).locked():
        pytest.fail("the lock was not taken")

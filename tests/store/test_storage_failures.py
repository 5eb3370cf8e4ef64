"""Failing disks (full, over quota, read-only, broken) are reported with path and reason, and nothing is left behind."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from cdpo_ray.errors import GenerationError, StoreError
from cdpo_ray.store import (
    RunFolder,
    copy,
    delete,
    describe,
    exists,
    move,
    new_file,
    read_json,
    read_table,
    storage_errors_within,
    write_json,
    write_table,
    write_text,
)

ERRNOS = ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE", "EFBIG", "EACCES", "EPERM")


def failing(name: str) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    return fail


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_text(path, "new"),
    "JSON": lambda path: write_json(path, {"new": 1}),
    "table": lambda path: write_table(pa.table({"x": [1]}), path),
    "copy": lambda path: copy(path.with_name("source"), path),
}
MOMENTS = {"open": (Path, "open"), "fsync": (os, "fsync"), "rename": (Path, "replace")}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ERRNOS)
def test_fault_60_a_failed_write_names_path_and_reason_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, writer: str, moment: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    (tmp_path / "source").write_bytes(b"new")
    reason = os.strerror(getattr(errno, name))
    with monkeypatch.context() as patched:
        patched.setattr(*MOMENTS[moment], failing(name))
        with pytest.raises(StoreError, match=f"^{path}: cannot be written: {reason}; "):
            WRITERS[writer](path)
    assert path.read_bytes() == b"old" and {*os.listdir(tmp_path)} == {"file", "source"}


@pytest.mark.parametrize("name", ERRNOS)
def test_fault_60_a_failed_read_move_or_deletion_names_path_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, reason = tmp_path / "file", os.strerror(getattr(errno, name))
    path.write_bytes(b"{}")
    for owner, method, doing, what in (
        (Path, "open", "read", describe),
        (Path, "read_bytes", "read", read_json),
        (Path, "exists", "read", exists),
        (Path, "unlink", "deleted", delete),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, method, failing(name))
            with pytest.raises(StoreError, match=f"^{path}: cannot be {doing}: {reason};"):
                what(path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", failing(name))
        with pytest.raises(StoreError, match=f"/moved: cannot be written: {reason};"):
            move(path, tmp_path / "moved")
    assert path.read_bytes() == b"{}"


def test_a_missing_file_is_an_answer_and_not_a_storage_failure(tmp_path: Path) -> None:
    for read in (read_json, describe, read_table):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
    (tmp_path / "half.parquet").write_bytes(b"PAR1")
    with pytest.raises(pa.ArrowInvalid, match="Parquet"):
        read_table(tmp_path / "half.parquet")
    delete(tmp_path / "none")


def test_fault_55_a_block_that_is_interrupted_leaves_no_file_behind(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_file(tmp_path / "file") as handle:
            handle.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not os.listdir(tmp_path)


def test_fault_55_a_full_disk_is_reported_with_its_free_space(tmp_path: Path) -> None:
    message = r"[\d,]+\.\d MiB are free; free disk space, and run the same command again$"
    with pytest.raises(StoreError, match=message), storage_errors_within(tmp_path / "not" / "there"):
        failing("ENOSPC")()


class WorkerError(Exception):
    """As Ray raises in the driver: with the text of a worker's traceback, or the error itself in `cause`."""

    def __init__(self, text: str, cause: BaseException | None = None) -> None:
        super().__init__(text)
        self.cause = cause


def from_a_worker(text: str) -> WorkerError:
    return WorkerError(f"worker died\nTraceback (most recent call last):\n  File 'x.py', line 1\n{text}\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            from_a_worker("OSError: [Errno 122] Disk quota exceeded"),
            "OSError: .* Disk quota exceeded; .* free disk space",
        ),
        (
            from_a_worker("OSError: Error writing bytes. Detail: [errno 5] Input/output error"),
            "Input/output error; check",
        ),
        (SafetensorError("I/O error: No space left on device (os error 28)"), r"\(os error 28\); .* free disk space"),
        (WorkerError("in a worker", OSError(errno.ESTALE, "Stale file handle", "a.bin")), "Stale file handle: 'a.bin'"),
        (
            from_a_worker("botocore.exceptions.ClientError: An error occurred (SlowDown) when calling PutObject"),
            r"An error occurred \(SlowDown\)",
        ),
        (WorkerError("\x1b[31m\x07[Errno 30] Read-only file system"), r"\\x1b\[31m\\x07\[Errno 30\]"),
    ],
)
def test_fault_60_errors_of_the_storage_are_recognized_in_libraries_and_workers(error: Exception, message: str) -> None:
    where = Path("runs/a/1-samples")
    with (
        pytest.raises(StoreError, match=f"^{where}: cannot be written or read: .*{message}"),
        storage_errors_within(where),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("beta"),
        ConnectionRefusedError(111, "refused"),
        GenerationError("bad"),
        WorkerError("No space left on device", StoreError("runs/a: cannot be written: No space left on device")),
        from_a_worker("cdpo_ray.errors.StoreError: runs/a: cannot be written: No space left on device"),
    ],
)
def test_other_errors_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, storage_errors_within(Path("runs/a")):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("name", ERRNOS)
def test_fault_60_a_step_whose_disk_fails_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = RunFolder(tmp_path)

    def attempt() -> None:
        with run.writing("1-samples", {}, {}, seed=0, resumable=True) as (folder, _):
            (folder / "shard").write_bytes(b"shard")
            monkeypatch.setattr(os, "fsync", failing(name))

    with pytest.raises(StoreError, match=f"1-samples.partial/shard: cannot be .*: {os.strerror(getattr(errno, name))}"):
        attempt()
    monkeypatch.undo()
    assert not run.has("1-samples")
    with run.writing("1-samples", {}, {}, seed=0, resumable=True):
        pass
    assert run.is_complete("1-samples", {}, {}) and not list(tmp_path.rglob("*.tmp"))

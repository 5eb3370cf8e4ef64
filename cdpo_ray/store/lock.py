"""Locks of a run's folder: one process writes at a time."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import secrets
import signal
import stat
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import fsspec.asyn
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from cdpo_ray.errors import LockHeldError, StoreError, printable
from cdpo_ray.store.copies import delete
from cdpo_ray.store.failures import one_line, storage_errors
from cdpo_ray.store.paths import is_local, make_folder, new_file, read_bytes

log = logging.getLogger(__name__)


class Holder(TypedDict):
    """Content of a lock file in an object store."""

    pid: Annotated[int, Field(ge=1, lt=2**31)]
    host: str
    id: str


HOLDER: TypeAdapter[Holder] = TypeAdapter(Holder)
LOCK = ".lock"
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Error numbers of `flock` on file systems without locks: some network disks, and those of some containers."""
UNKNOWN = "unknown process"
ANSWER_SECONDS = 3.0  # timeout of an object store
RENEW_SECONDS = 15.0
STALE_SECONDS = 60.0
SETTLE_SECONDS = 1.0  # if two processes take over a stale lock at once, the later one gets it


@contextlib.contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Lock a local folder for this process; the kernel releases the lock when the process ends.

    Raises:
        StoreError: the folder cannot be created or written, its lock file is a link, or another process holds the lock.
    """
    make_folder(folder)
    with storage_errors(folder):
        handle = _open_lock(folder / LOCK)
    with handle, contextlib.ExitStack() as stack:
        with storage_errors(folder):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in HELD:
                    handle.seek(0)
                    raise _held(
                        folder, printable(handle.read(200).decode(errors="replace").strip()) or UNKNOWN
                    ) from None
                if error.errno not in NO_LOCKS:
                    raise
                log.warning("%s: its disk has no file locks (%s); using a heartbeat lock file instead", folder, error)
                stack.enter_context(renewed_lock(folder / f"{LOCK}.held"))
            else:
                handle.truncate(0)
                handle.write(_holder(os.getpid(), platform.node()).encode())
        yield


def _open_lock(path: Path) -> BinaryIO:
    """Open a lock file without following links, because it is truncated later.

    Raises:
        StoreError: the path is a symbolic link, a hard link, or not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise StoreError(f"{path}: must be a regular file, got a symbolic link; delete it") from None
    handle = os.fdopen(descriptor, "a+b", buffering=0)  # on a full disk, a buffered write would fail only at `close`
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        handle.close()
        raise StoreError(f"{path}: must be a regular file with one hard link, got another kind; delete it")
    return handle


@contextlib.contextmanager
def renewed_lock(path: Path) -> Iterator[None]:
    """Lock the parent folder of ``path`` for this process by creating that file: object stores have no other locks.

    A thread renews the lock (heartbeat). It is taken over from a dead process of this machine, and from any process
    that has not renewed it for `STALE_SECONDS` by the storage's clock.

    Raises:
        StoreError: the storage does not answer or cannot be written, or another process holds the lock.
    """
    mine = json.dumps({"pid": os.getpid(), "host": platform.node(), "id": secrets.token_hex(8)}).encode()
    try:
        _put(path, mine, create=True)
    except FileExistsError:
        _refuse_unless_stale(path)
        log.warning("%s: taken over from a process that has ended", path)
        _put(path, mine)
        time.sleep(SETTLE_SECONDS)
        if _content(path) != mine:
            raise _held(path.parent, "it took the stale lock over at the same time") from None
    released = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, mine, released), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        released.set()
        renewer.join()
        try:
            if _content(path) == mine:
                delete(path)
        except StoreError as error:  # the work of the block stays valid
            log.warning("%s; the lock expires after %.0f s", error, STALE_SECONDS)


def _content(path: Path) -> bytes | None:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return None


def _put(path: Path, content: bytes, *, create: bool = False) -> None:
    """Write a lock file; an object store must answer within `ANSWER_SECONDS`.

    Raises:
        FileExistsError: ``create`` is set and the file exists.
        StoreError: the storage does not answer, or fails.
    """
    if is_local(path):
        if create:
            with storage_errors(path, "created"), path.open("xb", buffering=0) as created:
                created.write(content)
        else:
            with new_file(path) as replaced:
                replaced.write(content)
        return
    fs: Any = path.fs  # type: ignore[attr-defined]
    try:
        fsspec.asyn.sync(fs.loop, _put_object, fs, path.path, content, create, timeout=ANSWER_SECONDS)  # type: ignore[attr-defined]
    except FileExistsError:
        raise
    except TimeoutError:
        message = (
            f"the store did not answer in {ANSWER_SECONDS:g} s, or only with retryable errors; check the network and"
            " AWS_ENDPOINT_URL"
        )
    except Exception as error:  # clients of object stores raise other types than OSError
        reason = one_line(str(error))
        message = f"cannot be written: {reason}; check its bucket and the credentials, or choose another `run.dir`"
    else:
        return
    raise StoreError(f"{path.parent}: {message}")


async def _put_object(fs: Any, key: str, content: bytes, create: bool) -> None:
    if create:  # checked first, for stores that ignore the condition of the write
        with contextlib.suppress(FileNotFoundError):
            await fs._info(key)
            raise FileExistsError(key)
    await fs._pipe_file(key, content, mode="create" if create else "overwrite")


def _refuse_unless_stale(path: Path) -> None:
    try:
        content, renewed = read_bytes(path), _modified(path)
    except FileNotFoundError:  # released just now
        return
    try:
        found = HOLDER.validate_json(content, strict=True)
    except ValidationError:  # of another program, or not written yet
        holder = UNKNOWN
    else:
        if found["host"] == platform.node() and not is_alive(found["pid"]):
            return
        holder = _holder(found["pid"], found["host"])
    clock = path.with_name(f"{path.name}.clock")  # clocks of machines differ: both times are the storage's
    _put(clock, b"")
    age = _modified(clock) - renewed
    delete(clock)
    if age < STALE_SECONDS:
        raise _held(path.parent, f"{holder}, {age:.0f} s ago; its lock expires after {STALE_SECONDS:.0f} s")


def _modified(path: Path) -> float:
    """Unix time in seconds of the last write to a file, by the storage's clock."""
    with storage_errors(path, "read"):
        if is_local(path):
            return path.stat().st_mtime
        modified: datetime = path.fs.modified(path.path)  # type: ignore[attr-defined]
        return modified.timestamp()


def _renew(path: Path, mine: bytes, released: threading.Event) -> None:
    while not released.wait(RENEW_SECONDS):
        try:
            if _content(path) not in (mine, None):
                log.error("%s: another run has taken over this folder; stopping", path)
                os.kill(os.getpid(), signal.SIGINT)
                return
            _put(path, mine)
        except Exception as error:  # the next renewal may succeed
            log.warning("%s: could not be renewed: %s", path, error)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _holder(pid: int, host: str) -> str:
    return f"pid {pid} on {printable(host)}"


def _held(folder: Path, holder: str) -> LockHeldError:
    return LockHeldError(f"{folder}: another run is writing here ({holder}); wait for it, or choose another `run.name`")

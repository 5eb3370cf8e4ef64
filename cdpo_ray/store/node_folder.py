"""Folders on a node's disk that processes of one user share: working files, and copies of an object store's folders."""

import contextlib
import fcntl
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cdpo_ray.errors import StoreError
from cdpo_ray.store.copies import ANOTHER_TMPDIR, copy, describe, private_folder, refuse_full_disk
from cdpo_ray.store.failures import storage_errors
from cdpo_ray.store.lock import NO_LOCKS
from cdpo_ray.store.manifests import FILES_MANIFEST
from cdpo_ray.store.paths import MANIFEST, is_local
from cdpo_ray.store.untrusted import path_within, read_untrusted

COPY = "copy-"
"""Beginning of the names of copies."""
PARTIAL = "partial-"
"""Beginning of the names of folders that are not whole: they are being downloaded or deleted, or were until a kill."""
LOCK = "lock"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
STALE_SECONDS = 3 * 86400.0


class NodeFolder:
    """Folder of files that this process and others of its node and user read and write.

    Its name includes the boot of the node: other nodes that see the same disk have folders of their own, and data that
    a crash of the node may have lost is not used. Opening one deletes those that were unused for `STALE_SECONDS`.

    Attributes:
        path: exists until the last process has called `delete`; each process holds a shared lock on it.

    Args:
        prefix: of the names of folders of this kind.
        name: what the content is determined by.

    Raises:
        StoreError: the disk fails, or `private_folder` belongs to others.
    """

    def __init__(self, prefix: str, name: str) -> None:
        parent = private_folder()
        boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else platform.node()
        self.path = parent / f"{prefix}-{name}-{boot}"
        with storage_errors(self.path):
            for other in parent.glob(f"{prefix}-*"):
                with contextlib.suppress(FileNotFoundError):
                    if other != self.path and _is_unused(other):
                        _delete_unused(other)
            self._lock = self._locked()

    def _locked(self) -> BinaryIO:
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            try:
                handle = _open_lock(self.path / LOCK)
            except FileNotFoundError:  # deleted since the line above
                continue
            _flock(handle, fcntl.LOCK_SH)
            if os.fstat(handle.fileno()).st_nlink:
                self.touch()
                return handle
            handle.close()  # deleted before it was locked

    def touch(self) -> None:
        """Record that the folder is in use, for nodes whose locks do not see ours."""
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def delete(self) -> None:
        """Release the folder, and delete it unless another process uses it; raises StoreError."""
        self._lock.close()
        with storage_errors(self.path, "deleted"), contextlib.suppress(FileNotFoundError):
            _delete_unused(self.path)


def _is_unused(folder: Path) -> bool:
    return time.time() - folder.stat().st_mtime > STALE_SECONDS


def _delete_unused(folder: Path) -> None:
    with _open_lock(folder / LOCK) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use, or a disk without locks
            return
        doomed = folder.with_name(f"{folder.name}.{os.getpid()}")  # nobody opens it any more
        folder.rename(doomed)
        shutil.rmtree(doomed)


def local_copy(folder: Path) -> Path:
    """Path of a finished folder on local disk, for libraries that read local files only.

    A folder in an object store is downloaded by its manifest, once per node and again when it has changed: the other
    processes of the node wait for the first, and the next one downloads if it is killed. Each download deletes copies
    that were unused for `STALE_SECONDS`.

    Raises:
        StoreError: a downloaded file does not match the manifest, or the local disk is full or belongs to others.
    """
    if is_local(folder):
        return folder
    manifest = read_untrusted(folder / MANIFEST, FILES_MANIFEST, remedy=f"delete {folder} to regenerate it")
    copies = private_folder()
    done = copies / f"{COPY}{manifest['fingerprint']}"
    with storage_errors(copies), _open_lock(done.with_suffix(".lock")) as handle:
        _flock(handle, fcntl.LOCK_EX)
        if not done.is_dir():
            _delete_unused_copies(copies)
            _download(folder, manifest["files"], done)
        os.utime(done)
    return done


def _download(folder: Path, files: Mapping[str, Mapping[str, Any]], done: Path) -> None:
    refuse_full_disk(done.parent, sum(file["bytes"] for file in files.values()), remedy=ANOTHER_TMPDIR)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=done.parent, ignore_cleanup_errors=True) as parent:
        temporary = Path(parent) / "whole"
        for name, expected in files.items():
            copy(path_within(folder, name), temporary / name)
            if describe(temporary / name) != expected:
                raise StoreError(
                    f"{folder / name}: was altered (its SHA-256 differs); delete {folder} to regenerate it"
                )
        try:
            temporary.rename(done)
        except OSError:  # on a disk without locks, another process of this node was faster
            if not done.is_dir():
                raise


def _delete_unused_copies(copies: Path) -> None:
    for lock in copies.glob(f"{COPY}*.lock"):
        other = lock.with_suffix("")
        with contextlib.suppress(OSError), _open_lock(lock) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it is being looked up
            if _is_unused(other):
                other.rename(copies / f"{PARTIAL}{other.name}")  # a kill during the deletion leaves no part as a copy
    for partial in copies.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):  # another process deletes it
            if _is_unused(partial):
                shutil.rmtree(partial)


def _open_lock(path: Path) -> BinaryIO:
    """Open a lock file, also for reading: NFS refuses a shared lock of a file that is only written."""
    return path.open("a+b", buffering=0)


def _flock(handle: BinaryIO, operation: int) -> None:
    """Lock a file; without effect on a disk without locks, where nothing is deleted either."""
    try:
        fcntl.flock(handle, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise

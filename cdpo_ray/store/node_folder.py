"""Folders on a node's disk that processes of one user share, and that the last of them deletes."""

import contextlib
import fcntl
import os
import platform
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from cdpo_ray.store.copies import private_folder
from cdpo_ray.store.failures import storage_errors
from cdpo_ray.store.lock import NO_LOCKS

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
                    if other != self.path and time.time() - other.stat().st_mtime > STALE_SECONDS:
                        _delete_unused(other)
            self._lock = self._locked()

    def _locked(self) -> BinaryIO:
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            try:
                handle = (self.path / LOCK).open("ab", buffering=0)
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


def _delete_unused(folder: Path) -> None:
    with (folder / LOCK).open("ab", buffering=0) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # in use, or a disk without locks
            return
        doomed = folder.with_name(f"{folder.name}.{os.getpid()}")  # nobody opens it any more
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _flock(handle: BinaryIO, operation: int) -> None:
    """Lock a file; without effect on a disk without locks, where nothing is deleted either."""
    try:
        fcntl.flock(handle, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise

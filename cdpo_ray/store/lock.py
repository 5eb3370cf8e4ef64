"""One process at a time writes into a run's folder."""

import contextlib
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from cdpo_ray.errors import StoreError

LOCK = ".lock"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the lock goes with the process, however that ends.

    Raises:
        StoreError: the folder cannot be made or written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("a+")
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written: {error.strerror}; choose another `run.dir`") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            raise StoreError(
                f"{folder}: another run is writing here ({handle.read().strip() or 'unknown process'});"
                " wait for it, or choose another `run.name`"
            ) from None
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {platform.node()}")
        handle.flush()
        yield

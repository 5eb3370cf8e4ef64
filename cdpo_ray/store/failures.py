"""Errors of disks and object stores -> StoreError with path, reason and remedy."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from cdpo_ray.errors import CdpoError, StoreError, printable

FULL = (errno.ENOSPC, errno.EDQUOT)
STORAGE_ERRNOS = (
    *FULL,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
    errno.EFBIG,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
    errno.EREMOTEIO,
    errno.ENAMETOOLONG,
)
STORE_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google")
STORAGE_TEXT = re.compile(
    "|".join(
        [
            *(re.escape(os.strerror(number)) for number in STORAGE_ERRNOS),
            *(rf"\b{name}\.[\w.]*(?:Error|Exception)" for name in STORE_CLIENTS),
        ]
    )
)
"""Text of a storage error that reaches us as text: from a native library or from another process."""
MAX_REASON = 300
ANSWERS = {"read": FileNotFoundError, "created": FileExistsError}


@contextlib.contextmanager
def storage_errors(path: Path, doing: str = "written") -> Iterator[None]:
    """Convert errors of a disk or an object store to StoreError, in a block that does nothing but access ``path``.

    Args:
        doing: "written", "created", "read" or "deleted".

    Raises:
        FileNotFoundError, FileExistsError: on reading and on creating; they are answers, not failures.
        StoreError: with path, reason and remedy.
    """
    try:
        yield
    except CdpoError:
        raise
    except Exception as error:
        # Clients of object stores raise other types than OSError.
        if isinstance(error, ANSWERS.get(doing, ())) or (isinstance(path, Path) and not isinstance(error, OSError)):
            raise
        reason, named = str(error) or type(error).__name__, str(getattr(error, "filename", None) or path)
        if named in str(path) or str(path) in named:  # otherwise the reason must name its file
            reason = getattr(error, "strerror", None) or reason
        raise _store_error(path, doing, reason) from None


@contextlib.contextmanager
def storage_errors_within(folder: Path) -> Iterator[None]:
    """The same for a block that does other work too: only storage errors become StoreError.

    They may come from this process, from a native library, or from a Ray worker as text.
    """
    try:
        yield
    except CdpoError:
        raise
    except Exception as error:
        if (reason := _storage_reason(error)) is None:
            raise
        raise _store_error(folder, "written or read", reason) from error


def _storage_reason(error: BaseException) -> str | None:
    """Line that describes a storage failure; ``None``: not a storage failure, or one of our own errors describes it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CdpoError):
            return None
        if isinstance(seen, OSError) and seen.errno in STORAGE_ERRNOS:
            return str(seen)
        if type(seen).__module__.partition(".")[0] in STORE_CLIENTS:
            return str(seen)
        cause = getattr(seen, "cause", None) or seen.__cause__  # Ray stores a worker's exception in `cause`
        seen = cause if cause is not seen else None
    if f"{CdpoError.__module__}." in str(error):
        return None
    lines = [line for line in str(error).splitlines() if STORAGE_TEXT.search(line)]
    return lines[-1] if lines else None


def _store_error(path: Path, doing: str, reason: str) -> StoreError:
    is_full = any(os.strerror(number) in reason for number in FULL)
    remedy = "check the disk and its permissions"
    if not isinstance(path, Path):
        remedy = "check the network, the bucket and the credentials"
    elif is_full:
        remedy = "free disk space"
        with contextlib.suppress(OSError, StopIteration):
            existing = next(folder for folder in (path, *path.parents) if folder.is_dir())
            remedy = f"{shutil.disk_usage(existing).free / 2**20:,.1f} MiB are free; free disk space"
    return StoreError(f"{path}: cannot be {doing}: {one_line(reason)}; {remedy}, and run the same command again")


def one_line(text: str) -> str:
    """External text on one line, see `errors.printable`."""
    return printable(" ".join(text.split()).rstrip("."), MAX_REASON)

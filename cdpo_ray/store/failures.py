"""Errors of disks and object stores -> StoreError, with path, reason and what to do."""

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
"""What the text of an error holds that came from a library or a process in which it was no `OSError` of Python's."""
MAX_REASON = 300
ANSWERS = {"read": FileNotFoundError, "created": FileExistsError}


@contextlib.contextmanager
def storage_errors(path: Path, doing: str = "written") -> Iterator[None]:
    """Raise as StoreError what a disk or an object store answers in the block, which does nothing but use ``path``.

    Args:
        doing: "written", "created", "read" or "deleted".

    Raises:
        FileNotFoundError, FileExistsError: of what is read and created; they are answers, not failures.
        StoreError: with path, reason and what to do.
    """
    try:
        yield
    except CdpoError:
        raise
    except Exception as error:
        # The clients of object stores raise more kinds than OSError.
        if isinstance(error, ANSWERS.get(doing, ())) or (isinstance(path, Path) and not isinstance(error, OSError)):
            raise
        reason, named = str(error) or type(error).__name__, str(getattr(error, "filename", None) or path)
        if named in str(path) or str(path) in named:  # else the reason must say which file it is about
            reason = getattr(error, "strerror", None) or reason
        raise _store_error(path, doing, reason) from None


@contextlib.contextmanager
def storage_errors_within(folder: Path) -> Iterator[None]:
    """The same for a block that does other work too: only errors that are the storage's become StoreError.

    They may come from this process, from a library that is not written in Python, or from a worker of Ray as text.
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
    """The line that tells how the storage failed; ``None``: it did not, or an error of ours tells it already."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CdpoError):
            return None
        if isinstance(seen, OSError) and seen.errno in STORAGE_ERRNOS:
            return str(seen)
        if type(seen).__module__.partition(".")[0] in STORE_CLIENTS:
            return str(seen)
        cause = getattr(seen, "cause", None) or seen.__cause__  # Ray keeps what a worker raised in `cause`
        seen = cause if cause is not seen else None
    if f"{CdpoError.__module__}." in str(error):
        return None
    lines = [line for line in str(error).splitlines() if STORAGE_TEXT.search(line)]
    return lines[-1] if lines else None


def _store_error(path: Path, doing: str, reason: str) -> StoreError:
    is_full = any(os.strerror(number) in reason for number in FULL)
    what_to_do = "check the disk and its permissions"
    if not isinstance(path, Path):
        what_to_do = "check the network, the bucket and the credentials"
    elif is_full:
        what_to_do = "make room"
        with contextlib.suppress(OSError, StopIteration):
            there = next(folder for folder in (path, *path.parents) if folder.is_dir())
            what_to_do = f"{shutil.disk_usage(there).free / 2**20:,.1f} MiB are free there; make room"
    return StoreError(f"{path}: cannot be {doing}: {one_line(reason)}; {what_to_do}, and give the same command again")


def one_line(text: str) -> str:
    """A foreign text on one line, see `errors.printable`."""
    return printable(" ".join(text.split()).rstrip("."), MAX_REASON)

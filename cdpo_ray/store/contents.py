"""SHA-256 of files that a user names, such as a model's folder: to record what was read and to detect changes."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from cdpo_ray.errors import StoreError
from cdpo_ray.store.copies import describe, map_files
from cdpo_ray.store.paths import read_json

log = logging.getLogger(__name__)
KNOWN = Path(HF_HOME) / "cdpo_ray" / "sha256.json"
"""Cache of the SHA-256 of large sets of files, by their `_stamp`."""
_known_here: dict[str, str] = {}
"""The same cache within this process, in case the home folder is not writable."""
KNOWN_BYTES = 2**26  # smaller sets are read every time
MAX_KNOWN = 1000
SETTLED_SECONDS = 2.0
"""A file that changed more recently may change again within one tick of its file system's clock."""


def files_sha256(files: Mapping[str, Path], *, where: str) -> str:
    """SHA-256 of the names and contents of local files.

    A file that cannot be read or is not regular contributes its name only. A set of `KNOWN_BYTES` or more is read again
    only if the size, inode, modification time or status-change time of a file has changed since any process of this
    user last read it.

    Args:
        files: paths by name.
        where: location of the files, for messages.

    Raises:
        StoreError: a file changed while it was being read.
    """
    stamp, num_bytes, newest = _stamp(files)
    is_large = num_bytes >= KNOWN_BYTES
    if is_large and (known := _known_here.get(stamp) or _known().get(stamp)):
        return known
    if num_bytes >= 2**30:
        log.info("%s: computing the SHA-256 of %.1f GiB; cached until a file changes", where, num_bytes / 2**30)
    started, digest = time.time(), hashlib.sha256()
    for (name, _), found in zip(files.items(), map_files(_described, files.values()), strict=True):
        digest.update(json.dumps([name, found]).encode())
    if _stamp(files)[0] != stamp:
        raise StoreError(f"{where}: changed while it was being read; run the same command again")
    if is_large and newest < started - SETTLED_SECONDS:
        _remember(stamp, digest.hexdigest())
    return digest.hexdigest()


def _described(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, StoreError):  # ValueError: a NUL in its name
        return describe(path) if path.is_file() else None
    return None


def _stamp(files: Mapping[str, Path]) -> tuple[str, int, float]:
    """Digest of the files' metadata, total bytes, and Unix time of the latest change in seconds."""
    digest, num_bytes, newest = hashlib.sha256(), 0, 0
    for name, path in files.items():
        entry: list[Any] = [name]
        with contextlib.suppress(OSError, ValueError):
            status = path.stat()
            entry += [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
            num_bytes += status.st_size
            newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
        digest.update(json.dumps(entry).encode())
    return digest.hexdigest(), num_bytes, newest / 1e9


def _known() -> dict[str, str]:
    try:
        known = read_json(KNOWN)
    except (OSError, ValueError, StoreError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(stamp: str, sha256: str) -> None:
    _known_here[stamp] = sha256
    entries = [*(_known() | {stamp: sha256}).items()]
    with contextlib.suppress(OSError):
        KNOWN.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=KNOWN.parent, delete=False) as temporary:
            json.dump(dict(entries[-MAX_KNOWN:]), temporary)
        os.replace(temporary.name, KNOWN)

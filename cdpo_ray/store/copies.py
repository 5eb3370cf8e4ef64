"""Copying, moving, deleting and verifying files, and checks of free disk space."""

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cdpo_ray.errors import StoreError
from cdpo_ray.store.failures import storage_errors
from cdpo_ray.store.manifests import FILES_MANIFEST
from cdpo_ray.store.paths import MANIFEST, files_within, is_local, make_folder, new_file
from cdpo_ray.store.untrusted import path_within, read_untrusted

log = logging.getLogger(__name__)
MODE = 0o644  # safetensors writes 0600, which other users of a shared disk cannot read
FILES_AT_ONCE = 4  # hashing threads: a core hashes 1 GB/s, less than a disk reads
LINE_SECONDS = 60.0
ANOTHER_TMPDIR = "set TMPDIR to a folder on a larger disk"


def describe(path: Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file; raises FileNotFoundError, or StoreError if the storage fails."""
    digest, size = hashlib.sha256(), 0
    for block in _blocks(path):
        digest.update(block)
        size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(path: Path) -> Iterator[bytes]:
    """Content of a file in blocks of at most 4 MiB."""
    with storage_errors(path, "read"), path.open("rb") as handle:
        while block := handle.read(2**22):
            yield block


def find_damage(files: Mapping[Path, str], *, folder: Path) -> dict[Path, str]:
    """Read files in full and compare their SHA-256, `FILES_AT_ONCE` at a time.

    Args:
        files: expected SHA-256 by path.
        folder: folder that the files belong to, for the progress bar and the log.

    Returns:
        Description of the fault of each missing or altered file.
    """
    found, logged = dict[Path, str](), time.monotonic()
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        with tqdm(
            total=len(files), desc=f"verify {folder.name}", unit="file", delay=2, leave=False, disable=None
        ) as bar:
            for num_read, (path, sha256) in enumerate(zip(files, pool.map(_sha256, files), strict=True), start=1):
                if sha256 != files[path]:
                    found[path] = "was altered (its SHA-256 differs)" if sha256 else "is missing"
                bar.update()
                if time.monotonic() - logged > LINE_SECONDS:
                    logged = time.monotonic()
                    log.info("%s: %d of %d files verified", folder, num_read, len(files))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for files that have not been started
    return found


def _sha256(path: Path) -> str | None:
    """SHA-256 of a file; ``None``: no such file."""
    if is_local(path) and not path.is_file():  # reading a pipe may never end
        return None
    with contextlib.suppress(FileNotFoundError):
        return str(describe(path)["sha256"])
    return None


def flush_and_describe(path: Path) -> dict[str, Any]:
    """`describe` a finished file, after making it readable for others and flushing it to disk."""
    if is_local(path):
        with storage_errors(path):
            if not path.stat().st_mode & 0o004:
                path.chmod(MODE)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    return describe(path)


def link(source: Path, target: Path) -> None:
    """Hard-link a file to a second path, or copy it if the storage does not support links."""
    if is_local(source) and is_local(target):
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one without hard links
            pass
    copy(source, target)


def move(source: Path, target: Path) -> None:
    """Move a file within its disk or store; raises StoreError."""
    make_folder(target.parent)
    if is_local(source):
        with storage_errors(target):
            source.replace(target)
    else:
        copy(source, target)
        delete(source)


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically, from and to local disks and object stores.

    Raises:
        StoreError: a disk or a store fails.
    """
    make_folder(target.parent)
    if is_local(target):
        with new_file(target) as writable:
            for block in _blocks(source):
                writable.write(block)
        return
    with storage_errors(target):
        if is_local(source):
            target.fs.put_file(str(source), target.path)  # type: ignore[attr-defined]
        else:
            target.fs.cp_file(source.path, target.path)  # type: ignore[attr-defined]


def copy_tree(source: Path, target: Path) -> None:
    """Copy every file of a folder."""
    for name, path in files_within(source).items():
        copy(path, target / name)


def delete(path: Path) -> None:
    """Delete a file, or a folder with its content, if it exists.

    In an object store, the listed objects are deleted one by one: some stores do not support batch deletion, and some
    fail on the name of a folder, which is not an object.

    Raises:
        StoreError: the storage fails.
    """
    with storage_errors(path, "deleted"):
        if not is_local(path):
            for name in path.fs.find(path.path):  # type: ignore[attr-defined]
                with contextlib.suppress(FileNotFoundError):
                    path.fs.rm_file(name)  # type: ignore[attr-defined]
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def local_copy(folder: Path) -> Path:
    """Path of a finished folder on local disk, for libraries that read local files only.

    A folder in an object store is downloaded by its manifest, once per node and again when it has changed.

    Raises:
        StoreError: a downloaded file does not match the manifest, or the local disk is full or belongs to others.
    """
    if is_local(folder):
        return folder
    manifest = read_untrusted(folder / MANIFEST, FILES_MANIFEST, remedy=f"delete {folder} to regenerate it")
    copies = private_folder()
    with storage_errors(copies):
        done = copies / manifest["fingerprint"]
        if done.is_dir():
            return done
        needed_bytes = sum(file["bytes"] for file in manifest["files"].values())
        refuse_full_disk(copies, needed_bytes, remedy=ANOTHER_TMPDIR)
        with tempfile.TemporaryDirectory(dir=copies, ignore_cleanup_errors=True) as parent:
            temporary = Path(parent) / "whole"
            for name, expected in manifest["files"].items():
                copy(path_within(folder, name), temporary / name)
                if describe(temporary / name) != expected:
                    raise StoreError(
                        f"{folder / name}: was altered (its SHA-256 differs); delete {folder} to regenerate it"
                    )
            try:
                temporary.rename(done)
            except OSError:  # another process of this node was faster
                if not done.is_dir():
                    raise
    return done


def private_folder() -> Path:
    """Folder of this user on the node's disk, below the folder for temporary files, which no one else can open.

    Raises:
        StoreError: it cannot be created, or others can write to what has its name.
    """
    folder = Path(tempfile.gettempdir()) / f"cdpo_ray-{os.getuid()}"
    with storage_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise StoreError(
                f"{folder}: belongs to another user, is a link, or can be written by others; set TMPDIR to a folder of"
                " your own"
            )
    return folder


def refuse_full_disk(folder: Path, needed_bytes: int, *, remedy: str = "choose another `run.dir`") -> None:
    """Raise StoreError if a local disk has less free space than needed; object stores are not checked.

    Args:
        remedy: what else to do than to free disk space, for the message.
    """
    if not is_local(folder):
        return
    with storage_errors(folder, "read"):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise StoreError(
            f"{folder}: needs {needed_bytes / 2**20:,.1f} MiB, but {free / 2**20:,.1f} MiB are free on its disk;"
            f" free disk space, or {remedy}"
        )

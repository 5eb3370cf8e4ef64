"""Copying, moving, deleting and verifying files, and checks of free disk space."""

import contextlib
import hashlib
import itertools
import logging
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from cdpo_ray.errors import StoreError
from cdpo_ray.resources import usable_cpus
from cdpo_ray.store.failures import storage_errors
from cdpo_ray.store.paths import files_within, is_local, make_folder, new_file

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
MODE = 0o644  # safetensors writes 0600, which other users of a shared disk cannot read
BLOCK_BYTES = 2**22
OBJECTS_AT_ONCE = 64  # requests to an object store, each of which waits most of the time
FILES_PER_BATCH = 64
FILES_PER_TASK = 1024  # of a node of the cluster
LINE_SECONDS = 60.0
ANOTHER_TMPDIR = "set TMPDIR to a folder on a larger disk"


def describe(path: Path, num_bytes: int | None = None) -> dict[str, Any]:
    """`bytes` and `sha256` of a file; raises FileNotFoundError, or StoreError if the storage fails.

    Args:
        num_bytes: size of an object that was just listed, which saves a request.
    """
    digest, size = hashlib.sha256(), 0
    for block in _blocks(path, num_bytes):
        digest.update(block)
        size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _blocks(path: Path, num_bytes: int | None = None) -> Iterator[bytes]:
    """Content of a file in blocks of at most `BLOCK_BYTES`."""
    with storage_errors(path, "read"):
        if is_local(path) or num_bytes is None:
            with path.open("rb") as handle:
                while block := handle.read(BLOCK_BYTES):
                    yield block
        else:
            for start in range(0, num_bytes, BLOCK_BYTES):
                yield path.fs.cat_file(path.path, start=start, end=min(start + BLOCK_BYTES, num_bytes))  # type: ignore[attr-defined]


class MapOnNodes(Protocol):
    """Apply a function to items on the nodes of a cluster; yields the results in order."""

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any], /) -> Iterator[Any]: ...


_map_on_nodes = ContextVar[MapOnNodes | None]("map_on_nodes", default=None)


@contextlib.contextmanager
def objects_read_by(map_on_nodes: MapOnNodes) -> Iterator[None]:
    """Context manager within which the nodes of a cluster verify objects in a store, not this process alone."""
    token = _map_on_nodes.set(map_on_nodes)
    try:
        yield
    finally:
        _map_on_nodes.reset(token)


def map_files(function: Callable[[Path], Result], files: Collection[Path]) -> Iterator[Result]:
    """Apply a function that reads a file to each file, many at a time; yields the results in order."""
    return _in_threads(function, [*files], all(map(is_local, files)))


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item], are_local: bool) -> Iterator[Result]:
    # A core hashes 1 GB/s, less than a disk reads; a network disk answers several requests at a time.
    num_threads = max(4, usable_cpus()) if are_local else OBJECTS_AT_ONCE
    pool = ThreadPoolExecutor(num_threads)
    try:
        # Handing over one small file takes longer than hashing it.
        batches = _batches(items, min(FILES_PER_BATCH, len(items) // (8 * num_threads)))
        for results in pool.map(lambda batch: [*map(function, batch)], batches):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for batches that have not been started


def _batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    size = max(size, 1)
    return [items[start : start + size] for start in range(0, len(items), size)]


def find_damage(
    files: Mapping[Path, str],
    *,
    folder: Path,
    num_bytes: Mapping[Path, int] | None = None,
    read_up_to: float = math.inf,
) -> dict[Path, str]:
    """Read files in full and compare their SHA-256, many at a time; an object store lists their sizes in one go.

    Args:
        files: expected SHA-256 by path.
        folder: folder that the files belong to.
        num_bytes: expected sizes, as far as they are known.
        read_up_to: size limit in bytes; of larger files only the size is compared.

    Returns:
        Description of the fault of each missing or altered file.
    """
    sizes, found, logged = _sizes(files, folder), dict[Path, str](), time.monotonic()
    for path, size in sizes.items():
        if size is None:
            found[path] = "is missing"
        elif num_bytes and size != num_bytes[path]:
            found[path] = "was altered (its size differs)"
    read = {path: size for path, size in sizes.items() if size is not None and path not in found and size <= read_up_to}
    with tqdm(total=len(read), desc=f"verify {folder.name}", unit="file", delay=2, leave=False, disable=None) as bar:
        for num_read, (path, now) in enumerate(zip(read, _described(read), strict=True), start=1):
            if now is None or now["sha256"] != files[path]:
                found[path] = "was altered (its SHA-256 differs)" if now else "is missing"
            bar.update()
            if time.monotonic() - logged > LINE_SECONDS:
                logged = time.monotonic()
                log.info("%s: %d of %d files verified", folder, num_read, len(read))
    return {path: found[path] for path in files if path in found}


def _sizes(files: Collection[Path], folder: Path) -> dict[Path, int | None]:
    """Size of each file of a folder; ``None``: no such file."""
    with storage_errors(folder, "read"):
        if is_local(folder):
            return {path: _size(path) for path in files}
        listed = folder.fs.find(folder.path, detail=True)  # type: ignore[attr-defined]
    return {path: listed.get(path.path, {}).get("size") for path in files}  # type: ignore[attr-defined]


def _size(path: Path) -> int | None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None  # reading a pipe may never end


def _described(sizes: Mapping[Path, int]) -> Iterator[dict[str, Any] | None]:
    """`describe` each file, many at a time; ``None``: no such file."""
    files, map_on_nodes = [*sizes.items()], _map_on_nodes.get()
    if not map_on_nodes or all(map(is_local, sizes)):
        return _in_threads(_described_if_there, files, all(map(is_local, sizes)))
    return itertools.chain.from_iterable(map_on_nodes(_described_objects, _batches(files, FILES_PER_TASK)))


def _described_objects(files: Sequence[tuple[Path, int]]) -> list[dict[str, Any] | None]:
    return [*_in_threads(_described_if_there, files, are_local=False)]


def _described_if_there(file: tuple[Path, int]) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError):
        return describe(*file)
    return None


def flush_and_describe(files: Mapping[str, Path], *, folder: Path) -> dict[str, dict[str, Any]]:
    """`describe` finished files of a folder, after making them readable for others and flushing them to disk."""
    if is_local(folder):
        return dict(zip(files, map_files(_flushed, files.values()), strict=True))
    sizes = {path: size for path, size in _sizes(files.values(), folder).items() if size is not None}
    found = dict(zip(sizes, _described(sizes), strict=True))
    return {name: found.get(path) or describe(path) for name, path in files.items()}


def _flushed(path: Path) -> dict[str, Any]:
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

"""Paths on local disk, s3:// and gs:// with one interface, and atomic reads and writes of small files."""

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from upath import UPath

from cdpo_ray.config.section import check_place, without_credentials
from cdpo_ray.errors import StoreError
from cdpo_ray.store.failures import storage_errors

MANIFEST = "manifest.json"
CLIENT_OPTIONS: dict[str, Any] = {
    # Manifests hold SHA-256 sums of all files. Checksums in each request are recent, and some servers get them wrong.
    "s3": {
        "config_kwargs": {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    }
}
JOB_COPIES = "/runtime_resources/working_dir_files/"
"""Part of the path of Ray's copies of jobs' working folders."""


def storage_path(text: str | Path) -> Path:
    """Local path, or `UPath` in an object store, which has the methods of `Path` and also `fs` and `path`.

    Endpoint and credentials come from the environment, as for all clients of these stores.

    Raises:
        StoreError: the URL has another scheme, holds credentials, or needs a package that is not installed.
    """
    if isinstance(text, Path | UPath):
        return text
    try:
        text = check_place(text)
    except ValueError as error:
        raise StoreError(f"{without_credentials(text)}: {error}") from None
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(text)
    # Other processes write too: a cached listing becomes stale.
    path = UPath(text, use_listings_cache=False, **CLIENT_OPTIONS.get(scheme, {}))
    try:
        _ = path.fs
    except ImportError:
        raise StoreError(f'{text}: {scheme}:// needs `pip install "cdpo_ray[{scheme}]"`') from None
    return cast(Path, path)


def refuse_special_file(path: Path) -> None:
    """Refuse to read a pipe, a device or a socket, which may never end.

    Raises:
        OSError: the path is one of them, or does not exist.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder is refused where it is opened
        raise OSError(errno.EINVAL, "is a pipe, a device or a socket, not a regular file", str(path))


def output_path(text: str | Path, key: str) -> Path:
    """Path to write to that outlives the process.

    Args:
        text: local path or URL.
        key: key of the configuration or option of the command line, for the message.

    Raises:
        StoreError: as `storage_path`; or the path is in the copy of the working folder that a Ray job runs in.
    """
    path = storage_path(text)
    if is_local(path) and JOB_COPIES in str(path.resolve()):
        raise StoreError(
            f"`{key}` {text}: is {path.resolve()}, in this Ray job's copy of the working directory, which Ray deletes;"
            f" give an absolute path on storage that all nodes see, as `{key}` /shared/runs, or s3://bucket/runs"
        )
    return path


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def make_folder(path: Path) -> None:
    """Create a local folder and its parents; object stores need none. Raises StoreError."""
    if is_local(path):
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)


def exists(path: Path) -> bool:
    """Whether a file or a folder exists.

    Raises:
        StoreError: the storage fails, where `UPath.exists` would return False.
    """
    with storage_errors(path, "read"):
        if is_local(path):
            return path.exists()
        try:
            path.fs.info(path.path)  # type: ignore[attr-defined]
        except FileNotFoundError:
            return False
        return True


def files_within(folder: Path) -> dict[str, Path]:
    """All files of a folder and its subfolders, by relative path, sorted.

    Raises:
        StoreError: the storage fails.
    """
    with storage_errors(folder, "read"):
        if is_local(folder):
            found = {name: path for name in _names_within(str(folder)) if (path := folder / name).is_file()}
        else:
            paths = folder.fs.find(folder.path)  # type: ignore[attr-defined]
            names = [path.removeprefix(f"{folder.path}/") for path in paths]  # type: ignore[attr-defined]
            found = {name: folder / name for name in names if name and not name.endswith("/")}  # pyarrow marks folders
    return dict(sorted(found.items()))


def _names_within(folder: str) -> Iterator[str]:
    if not Path(folder).is_dir():  # raises, unlike `os.path.isdir`, if the disk fails
        return
    for parent, _, names in walk(folder):
        inner = parent.removeprefix(folder).lstrip("/")
        yield from (os.path.join(inner, name) for name in names)


def walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that raises OSError for a folder that cannot be listed, which `os.walk` leaves out."""

    def fail(error: OSError) -> None:
        raise error

    return os.walk(folder, onerror=fail)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Context manager that yields a new binary file; it appears at ``path`` if the block succeeds, else not at all.

    It is written to a temporary file and renamed: a symbolic link at ``path`` is replaced, not followed.

    Raises:
        StoreError: the storage fails.
    """
    if not is_local(path):
        with tempfile.NamedTemporaryFile() as handle:  # fsspec would upload a truncated object if the block failed
            with storage_errors(Path(handle.name)):
                yield handle  # type: ignore[misc]
                handle.flush()
            with storage_errors(path):
                path.fs.put_file(handle.name, path.path)  # type: ignore[attr-defined]
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with storage_errors(path):
        try:
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; raises StoreError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; raises StoreError."""
    with new_file(path) as handle:
        handle.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; raises StoreError."""
    write_text(path, json.dumps(value, indent=1))


def read_bytes(path: Path) -> bytes:
    """Read a small file; raises FileNotFoundError, or StoreError if the storage fails."""
    with storage_errors(path, "read"):
        if is_local(path):
            return path.read_bytes()
        content: bytes = path.fs.cat_file(path.path)  # type: ignore[attr-defined]
        return content


def read_json(path: Path) -> Any:
    """Read a JSON file; raises as `read_bytes`, and ValueError if it is not JSON."""
    return json.loads(read_bytes(path).decode())

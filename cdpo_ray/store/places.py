"""Paths on local disk, s3:// and gs://, with one interface; a file is there whole or not at all."""

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
    # Manifests hold SHA-256 sums of all files. Checksums in each request are new, and some servers get them wrong.
    "s3": {
        "config_kwargs": {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    }
}
JOB_COPIES = "/runtime_resources/working_dir_files/"
"""Ray keeps its copies of jobs' working folders in such a folder of its session."""


def place(text: str | Path) -> Path:
    """A local path, or one in an object store: a `UPath`, which has the methods of `Path`, its `fs`, and `path` in it.

    Endpoint and credentials come from the environment, as for all that speaks to these stores.

    Raises:
        StoreError: it is of another kind, holds credentials, or the package that speaks to it is not installed.
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
    # Other processes write too: a listing that is kept goes stale.
    path = UPath(text, use_listings_cache=False, **CLIENT_OPTIONS.get(scheme, {}))
    try:
        _ = path.fs
    except ImportError:
        raise StoreError(f'{text}: {scheme}:// needs `pip install "cdpo_ray[{scheme}]"`') from None
    return cast(Path, path)


def refuse_special_file(path: Path) -> None:
    """Refuse a pipe, a device or a socket where a file is to be read: reading it may never end.

    Raises:
        OSError: it is one, or nothing is there.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder is refused where it is opened
        raise OSError(errno.EINVAL, "is a pipe, a device or a socket, not a regular file", str(path))


def output_place(text: str | Path, key: str) -> Path:
    """A place to write to, which stays when the process has ended.

    Args:
        key: of the configuration or the command line, for the message.

    Raises:
        StoreError: as of `place`; or it is in the copy of the working folder that a Ray job runs in.
    """
    path = place(text)
    if is_local(path) and JOB_COPIES in str(path.resolve()):
        raise StoreError(
            f"`{key}` {text}: is {path.resolve()}, in this Ray job's copy of the working folder, which Ray deletes;"
            f" give an absolute path on storage that all nodes see, as `{key}` /shared/runs, or s3://bucket/runs"
        )
    return path


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def make_folder(path: Path) -> None:
    """Make a local folder and those above it, an object store has none to make; raises StoreError."""
    if is_local(path):
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)


def exists(path: Path) -> bool:
    """Whether a file or a folder is there.

    Raises:
        StoreError: the disk or the store does not tell; `UPath.exists` would say no.
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
    """All files of a folder and the folders in it, by their names from there, sorted.

    Raises:
        StoreError: the disk or the store does not tell.
    """
    with storage_errors(folder, "read"):
        if is_local(folder):
            found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        else:
            paths = folder.fs.find(folder.path)  # type: ignore[attr-defined]
            names = [path.removeprefix(f"{folder.path}/") for path in paths]  # type: ignore[attr-defined]
            found = {name: folder / name for name in names if name and not name.endswith("/")}  # pyarrow marks folders
    return dict(sorted(found.items()))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which is put in place when the block ends well; else nothing is left of it.

    It is written beside its place, as a file that is new: a symbolic link of that name is unlinked, not followed.

    Raises:
        StoreError: the disk or the store fails.
    """
    if not is_local(path):
        with tempfile.NamedTemporaryFile() as handle:  # were a block to fail, the object would be there, cut short
            with storage_errors(Path(handle.name)):
                yield handle  # type: ignore[misc]
                handle.flush()
            with storage_errors(path):
                path.fs.put_file(handle.name, path.path)  # type: ignore[attr-defined]
        return
    aside = path.with_name(f"{path.name}.tmp")
    with storage_errors(path):
        try:
            aside.unlink(missing_ok=True)
            with aside.open("xb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            aside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises StoreError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises StoreError."""
    with new_file(path) as handle:
        handle.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; raises StoreError."""
    write_text(path, json.dumps(value, indent=1))


def read_bytes(path: Path) -> bytes:
    """Read a small file; raises FileNotFoundError, or StoreError where the disk or the store fails."""
    with storage_errors(path, "read"):
        if is_local(path):
            return path.read_bytes()
        content: bytes = path.fs.cat_file(path.path)  # type: ignore[attr-defined]
        return content


def read_json(path: Path) -> Any:
    """Read JSON; raises as `read_bytes`, and ValueError where it is not JSON."""
    return json.loads(read_bytes(path).decode())

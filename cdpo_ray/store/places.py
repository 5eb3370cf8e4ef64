"""Paths on local disk, s3:// and gs://, with one interface; a file is there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any, cast

from upath import UPath

from cdpo_ray.config.section import check_place, without_credentials
from cdpo_ray.errors import StoreError

MANIFEST = "manifest.json"
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
        check_place(text)
    except ValueError as error:
        raise StoreError(f"{without_credentials(text)}: {error}") from None
    scheme, separator, _ = text.partition("://")
    if not separator:
        return Path(text)
    path = UPath(text, use_listings_cache=False)  # other processes write too: a listing that is kept goes stale
    try:
        _ = path.fs
    except ImportError:
        raise StoreError(f'{text}: {scheme}:// needs `pip install "cdpo_ray[{scheme}]"`') from None
    return cast(Path, path)


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
    """Make a local folder and those above it; an object store has none to make."""
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)


def exists(path: Path) -> bool:
    """Whether a file or a folder is there.

    Raises:
        StoreError: the store does not tell; `UPath.exists` would say no.
    """
    if is_local(path):
        return path.exists()
    try:
        path.fs.info(path.path)  # type: ignore[attr-defined]
    except FileNotFoundError:
        return False
    except Exception as error:  # the stores' own libraries have more kinds than OSError
        raise StoreError(f"{path}: cannot be read: {error}; check the network and the credentials") from None
    return True


def files_within(folder: Path) -> dict[str, Path]:
    """All files of a folder and the folders in it, by their names from there, sorted."""
    if is_local(folder):
        found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    else:
        paths = folder.fs.find(folder.path)  # type: ignore[attr-defined]
        names = [path.removeprefix(f"{folder.path}/") for path in paths]  # type: ignore[attr-defined]
        found = {name: folder / name for name in names if name and not name.endswith("/")}  # pyarrow marks folders so
    return dict(sorted(found.items()))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if not is_local(path):
        path.write_text(text, encoding="utf-8")  # an object is not seen before it is whole
        return
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

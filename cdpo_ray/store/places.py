"""Paths on local disk, s3:// and gs://, with one interface; a file is there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any, cast

from upath import UPath

from cdpo_ray.errors import StoreError

MANIFEST = "manifest.json"
EXTRAS = {"s3": "s3", "gs": "gs"}
"""Schemes of object stores, with the extra of this package that brings each."""


def place(text: str | Path) -> Path:
    """A local path, or one in an object store (`UPath`, which has `Path`'s methods, an `fs` and a `path` in it).

    Raises:
        StoreError: the scheme is not known, or the package that speaks it is not installed.
    """
    scheme, separator, _ = str(text).partition("://")
    if not separator:
        return Path(text)
    if scheme not in EXTRAS:
        raise StoreError(f"{scheme}://: must be a local folder, {' or '.join(f'{name}://...' for name in EXTRAS)}")
    try:
        # Other processes write too: a listing that is kept goes stale.
        return cast(Path, UPath(text, use_listings_cache=False))
    except ImportError:
        raise StoreError(f'{text}: {scheme}:// needs `pip install "cdpo_ray[{EXTRAS[scheme]}]"`') from None


def is_local(path: Path) -> bool:
    return isinstance(path, Path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    if not is_local(path):
        path.write_text(text, encoding="utf-8")  # an object is seen when it is whole
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

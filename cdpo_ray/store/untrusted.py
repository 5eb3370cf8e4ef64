"""Validation of file names and JSON in a run's folder, which somebody else may have written."""

import os
import reprlib
import stat
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from cdpo_ray.errors import StoreError, printable
from cdpo_ray.store.failures import storage_errors
from cdpo_ray.store.paths import is_local, read_bytes, walk

MAX_TEXT_BYTES = 2**28
MAX_NAME_CHARS = 1024
SHOWN_FAULTS = 3
other_keys_allowed = with_config(ConfigDict(extra="allow"))
"""Decorator of a ``TypedDict``: undeclared keys are kept instead of refused."""


def _aware(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("has no time zone")
    return text


Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, le=1e10, allow_inf_nan=False)]
Timestamp = Annotated[str, AfterValidator(_aware)]
"""ISO 8601 date and time with a time zone."""


class Predicted(TypedDict):
    """Estimate of a step's duration, see `records.PREDICTED`."""

    gpu: str
    seconds: Seconds


def path_within(folder: Path, name: str) -> Path:
    """Join a folder and a relative name, which must not leave the folder by ``..`` or a symbolic link.

    The folder itself may be a symbolic link. Object stores have no links.

    Raises:
        StoreError: the name is absolute, leads out of the folder, or holds control characters or backslashes; or a
            symbolic link within the path leads out of the folder.
    """
    return paths_within(folder, [name])[name]


def paths_within(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """`path_within` by name; links of folders are resolved once, which takes most of the time."""
    found, checked = dict[str, Path](), set[str]()
    inside = os.path.realpath(folder) if is_local(folder) else ""
    for name in names:
        parts = name.split("/")
        if (
            len(name) > MAX_NAME_CHARS
            or not name.isprintable()
            or "\\" in name
            or not {"", ".", ".."}.isdisjoint(parts)
        ):
            raise StoreError(
                f"{folder}: the file name {printable(repr(name))} leads out of the folder, or is not a relative path;"
                " the folder was altered, do not use it"
            )
        found[name] = path = folder / name
        if not inside:
            continue
        parent = os.path.join(inside, *parts[:-1])
        leads_out = parent not in checked and not _is_within(parent, inside)
        checked.add(parent)
        if leads_out or (os.path.islink(file := os.path.join(parent, parts[-1])) and not _is_within(file, inside)):
            raise StoreError(
                f"{path}: is a symbolic link that leads out of {folder}; replace the link with the file or folder"
                " itself, if you trust it"
            )
    return found


def _is_within(path: str, inside: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(inside)


def refuse_links_out(folder: Path, within: Path) -> None:
    """Refuse a local folder that contains, at any depth, a symbolic link out of the folder ``within``.

    Raises:
        StoreError: there is such a link, or the storage fails.
    """
    if not is_local(folder):
        return
    with storage_errors(folder, "read"):
        for parent, folders, files in walk(folder):
            for name in (*folders, *files):
                path = Path(parent) / name
                if path.is_symlink():
                    path_within(within, str(path.relative_to(within)))


def read_untrusted(path: Path, kind: TypeAdapter[Any], *, remedy: str) -> Any:
    """Read a JSON file and validate it, without type conversion.

    Args:
        kind: expected type; undeclared keys of a ``TypedDict`` are kept if it allows them.
        remedy: what to do about a damaged file, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: as `read_untrusted_bytes` and `validate_untrusted`.
    """
    return validate_untrusted(read_untrusted_bytes(path, remedy=remedy), kind, where=str(path), remedy=remedy)


def read_untrusted_bytes(path: Path, *, remedy: str) -> bytes:
    """Content of a text file of at most `MAX_TEXT_BYTES`.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: the file is not regular, is too large, or cannot be read.
    """
    try:
        status = path.stat()
        if is_local(path) and not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise StoreError(f"{path}: is damaged (not a regular file); {remedy}")
        if status.st_size > MAX_TEXT_BYTES:
            raise StoreError(f"{path}: is damaged ({status.st_size:,} bytes, at most {MAX_TEXT_BYTES:,}); {remedy}")
        return read_bytes(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror or error}; check its permissions") from None


def validate_untrusted(text: str | bytes, kind: TypeAdapter[Any], *, where: str, remedy: str) -> Any:
    """Validate JSON as `read_untrusted` does.

    Args:
        where: location of the text, for the message.
        kind, remedy: see `read_untrusted`.

    Raises:
        StoreError: the text is not JSON, or not of this type.
    """
    try:
        return kind.validate_json(text, strict=True)
    except ValidationError as error:
        raise StoreError(damage_message(error, where=where, remedy=remedy)) from None


def damage_message(error: ValidationError, *, where: str, remedy: str) -> str:
    """Message of a `StoreError` about an invalid file."""
    faults = error.errors(include_url=False, include_context=False)
    shown = "; ".join(_sentence(fault) for fault in faults[:SHOWN_FAULTS])
    more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    return f"{where}: is damaged ({shown}{more}); {remedy}"


def _sentence(fault: Any) -> str:
    key = printable(".".join(map(str, fault["loc"])))
    got = "" if fault["type"] in ("json_invalid", "missing") else f", got {printable(reprlib.repr(fault['input']))}"
    return f"{f'`{key}`: ' if key else ''}{printable(fault['msg'])}{got}"

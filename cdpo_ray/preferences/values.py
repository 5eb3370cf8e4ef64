"""Value of a row -> prompt, number or image, or the reason why it is invalid."""

import ast
import base64
import binascii
import json
import math
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote_to_bytes

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
BASE64_PREFIXES = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk", "SUkq", "TU0AK")
"""Prefixes of PNG, JPEG, WebP, GIF, BMP and TIFF in base64."""
MIN_BASE64 = 40
"""Number of characters of the smallest image in base64; a shorter string is a path."""
MAX_PATH_SHOWN = 300
MAX_LIST_CHARACTERS = 100_000
TRUTHS = {"true": 1.0, "false": 0.0}
TIES = {"tie", "tied", "draw", "equal", "both", "bothbad", "neither"}

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80


def shown(value: object) -> str:
    """Untrusted value for a message: one line, control characters escaped, shortened."""
    return _shortened.repr(value)


def name_of(image: str) -> str:
    """Path of an image for a message; a string too long for a path is shortened."""
    return image if len(image) <= MAX_PATH_SHOWN else shown(image)


def prompt_of(values: Mapping[str, Any], name: str) -> str:
    """Text of a column, without surrounding white space.

    Raises:
        ValueError: if it is not a string, is empty, or holds an unpaired surrogate.
    """
    prompt = values.get(name)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"`{name}` must be a non-empty string, got {shown(prompt)}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` holds half of a surrogate pair ({prompt[error.start]!r})") from None
    return prompt.strip()


def number_of(values: Mapping[str, Any], name: str) -> float:
    """Number of a column, which may be a string; true is 1, false 0.

    Raises:
        ValueError: if it is not a finite number.
    """
    value = values.get(name)
    try:
        number = float(TRUTHS.get(str(value).strip().lower(), value))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be a number, got {shown(value)}")
    return number


def is_false(value: object) -> bool:
    """Whether a flag is off: false or 0, as a number or a string."""
    return str(value).strip().lower() in ("false", "0", "0.0")


def list_of(values: Mapping[str, Any], name: str) -> Sequence[Any]:
    """List of a column, which text tables write as JSON or as Python does.

    Raises:
        ValueError: if it is not a list.
    """
    value = values.get(name)
    if isinstance(value, str) and len(value) <= MAX_LIST_CHARACTERS:
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{name}` must be a list with one value per image, got {shown(value)}")
    return value


def winner_of(values: Mapping[str, Any], name: str, images: Sequence[str]) -> str | None:
    """Which of two columns of images is preferred; an empty text in a tie, `None` without a value.

    A value names a column, or the part in which its name differs from the other, such as ``a`` for ``image_a``.

    Raises:
        ValueError: if the value names neither a column nor a tie.
    """
    value = values.get(name)
    if isinstance(value, float):  # pandas stores integers beside nulls as floats
        value = int(value) if value.is_integer() else None if math.isnan(value) else value
    words = re.findall(r"[^\W_]+", str(value).casefold()) if value is not None else []
    if not words:
        return None
    if not TIES.isdisjoint(words):
        return ""
    parts = [re.findall(r"[^\W\d_]+|\d+", image.casefold()) for image in images]
    apart = [{*part}.difference(*(other for other in parts if other is not part)) for part in parts]
    split = {*words, *(part for word in words for part in re.findall(r"[^\W\d_]+|\d+", word))}
    named = [image for image, part in zip(images, apart, strict=True) if part & split]
    if len(named) != 1:
        choices = ", ".join("".join(sorted(part)) for part in apart)
        raise ValueError(f"`{name}` must be one of {choices}, or tie, got {shown(value)}")
    return named[0]


def image_of(values: Mapping[str, Any], name: str, folder: Path | None) -> bytes | str:
    """Image of a column: its bytes, or the path of its file.

    Bytes may be raw, base64 or a data URI; bytes and paths may be in the struct in which hub data sets keep an image.
    Backslashes separate folders, and `~` is the home folder, if no file has such a name.

    Args:
        folder: base of relative paths; `None`: paths are refused.

    Raises:
        ValueError: if it is none of these, or a URL.
    """
    value = values.get(name)
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if value.startswith("data:"):
            return _of_data_uri(value, name)
        if URL.match(value):
            raise ValueError(f"`{name}` is a URL, {shown(value)}; download the image, and give its path")
        if (data := _of_base64(value)) is not None:
            return data
        if folder is None:
            raise ValueError(f"`{name}` must be in the archive, got the path {shown(value)}")
        path = folder / value
        if "\\" in value and not os.path.exists(path):
            path = folder / PureWindowsPath(value).as_posix()
        if value.startswith("~") and not os.path.exists(path):
            path = folder / os.path.expanduser(value)
        return str(path)
    if isinstance(value, bytes):
        data = _of_base64(value.decode("ascii")) if value.isascii() else None
        return value if data is None else data
    raise ValueError(f"`{name}` must be an image's bytes or its path, got {type(value).__name__}")


def _of_data_uri(text: str, name: str) -> bytes:
    head, _, data = text.partition(",")
    content = unquote_to_bytes(data)
    if not head.endswith(";base64"):
        return content
    try:
        return base64.b64decode(content)
    except binascii.Error as error:
        raise ValueError(f"`{name}` is a data URI with invalid base64: {error}") from None


def _of_base64(text: str) -> bytes | None:
    """Decode an image in base64, with or without line breaks and padding; `None`: any other text."""
    if len(text) < MIN_BASE64 or not text.startswith(BASE64_PREFIXES):
        return None
    packed = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except binascii.Error:
        return None

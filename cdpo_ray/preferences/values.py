"""Value of a row -> prompt, number or image, or the reason why it is invalid."""

import base64
import binascii
import math
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import unquote_to_bytes

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
BASE64_PREFIXES = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk", "SUkq", "TU0AK")
"""Prefixes of PNG, JPEG, WebP, GIF, BMP and TIFF in base64."""
MIN_BASE64 = 40
"""Number of characters of the smallest image in base64; a shorter string is a path."""
MAX_PATH_SHOWN = 300

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
    """Number of a column, which may be a string.

    Raises:
        ValueError: if it is not a finite number.
    """
    value = values.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`{name}` must be a number, got {shown(value)}")
    return number


def is_false(value: object) -> bool:
    """Whether a flag is off: false or 0, as a number or a string."""
    return str(value).strip().lower() in ("false", "0", "0.0")


def image_of(values: Mapping[str, Any], name: str, folder: Path) -> bytes | str:
    """Image of a column: its bytes, or the path of its file.

    Bytes may be raw, base64 or a data URI; bytes and paths may be in the struct in which hub data sets keep an image.
    Backslashes separate folders if no file has such a name.

    Args:
        folder: base of relative paths.

    Raises:
        ValueError: if it is none of these, or a URL.
    """
    value = values.get(name)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if value.startswith("data:"):
            return _of_data_uri(value, name)
        if URL.match(value):
            raise ValueError(f"`{name}` is a URL, {shown(value)}; download the image, and give its path")
        if (data := _of_base64(value)) is not None:
            return data
        path = folder / value
        if "\\" in value and not os.path.exists(path):
            path = folder / PureWindowsPath(value).as_posix()
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

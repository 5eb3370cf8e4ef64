"""A value of a row -> prompt, number or image, or what is wrong with it."""

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
BASE64_HEADS = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "Qk", "SUkq", "TU0AK")
"""How base64 of PNG, JPEG, WebP, GIF, BMP and TIFF begins."""
MIN_BASE64 = 40
"""Characters of the smallest image; a shorter text is a path."""
MAX_PATH_SHOWN = 300

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80


def shown(value: object) -> str:
    """A value of somebody's file to show in a message: in one line, control characters escaped, not too long."""
    return _shortened.repr(value)


def name_of(image: str) -> str:
    """The path of an image to show in a message: a text that is too long for a path is shortened."""
    return image if len(image) <= MAX_PATH_SHOWN else shown(image)


def prompt_of(values: Mapping[str, Any], name: str) -> str:
    """The text of a column, without white space around it.

    Raises:
        ValueError: it is no text, empty, or holds half of a character.
    """
    prompt = values.get(name)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"`{name}` must be a text that is not empty, got {shown(prompt)}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` holds half of a character ({prompt[error.start]!r})") from None
    return prompt.strip()


def number_of(values: Mapping[str, Any], name: str) -> float:
    """The number of a column, which may be written as text.

    Raises:
        ValueError: it is no finite number.
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
    """Whether a flag is off: false or 0, as a number or as text."""
    return str(value).strip().lower() in ("false", "0", "0.0")


def image_of(values: Mapping[str, Any], name: str, folder: Path) -> bytes | str:
    """The image of a column: its bytes, or the path of its file.

    Bytes may be given as they are, as base64 or as a data URI, and both within the struct in which hub data sets keep
    an image. A path begins at ``folder``; the separators of Windows are taken where no file has such a name.

    Raises:
        ValueError: it is none of these, or a URL.
    """
    value = values.get(name)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        if value.startswith("data:"):
            return _of_data_uri(value, name)
        if URL.match(value):
            raise ValueError(f"`{name}` is a URL, {shown(value)}; download the image first, and give its path")
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
        raise ValueError(f"`{name}` is a data URI whose base64 cannot be read: {error}") from None


def _of_base64(text: str) -> bytes | None:
    """Bytes of an image in base64, which may have line ends and lack padding; ``None`` of any other text."""
    if len(text) < MIN_BASE64 or not text.startswith(BASE64_HEADS):
        return None
    packed = "".join(text.split()).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except binascii.Error:
        return None

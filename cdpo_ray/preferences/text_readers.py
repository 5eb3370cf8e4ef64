"""Readers of text: JSON, tables with delimiters, and folders with a text file."""

import codecs
import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cdpo_ray.errors import PreferenceError, PromptError
from cdpo_ray.preferences.reader import (
    ROWS_PER_BLOCK,
    Chunk,
    Reader,
    is_compressed,
    open_bytes,
    refusing_damage,
)
from cdpo_ray.preferences.rows import Numbered, PreferenceSource
from cdpo_ray.preferences.values import shown
from cdpo_ray.prompts.files import csv_records
from cdpo_ray.store import refuse_special_file

FIRST_ROWS = 16
"""Rows whose columns are those of the file."""
TEXT_AT_ONCE = 2**16  # characters
MAX_ITEM_CHARACTERS = 2**28
"""Length of an item of a JSON list, with its images in base64."""
MAX_FIELD_CHARACTERS = 2**27
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
RANK = re.compile(r"^(\d+)")
SPACE = re.compile(r"[\s,]*")


class Lines(Reader):
    """JSON lines: one object per line."""

    def columns(self, path: Path, source: PreferenceSource) -> Collection[str]:
        with refusing_damage(path), open_bytes(path) as handle:
            lines = [_line(line, first=number == 0) for number, line in enumerate(islice(handle, ROWS_PER_BLOCK))]
        objects = [values for values in map(_json_object, filter(None, lines)) if isinstance(values, dict)]
        if not objects and lines and lines[0].startswith(b"["):
            raise PreferenceError(f"{path}: is a JSON list, not one object per line; rename it to end in .json")
        return dict.fromkeys(name for values in objects for name in values)

    def rows(self, path: Path, source: PreferenceSource) -> Iterator[Numbered]:
        with refusing_damage(path), open_bytes(path) as handle:
            yield from _json_lines(handle, 1)

    def seeks(self, path: Path) -> bool:
        return not is_compressed(path)

    def chunks(self, path: Path, source: PreferenceSource) -> Iterator[Chunk]:
        if is_compressed(path):
            yield from super().chunks(path, source)
            return
        with refusing_damage(path), path.open("rb") as handle:
            lines, number, offset = list(islice(handle, ROWS_PER_BLOCK)), 1, 0
            while lines:
                yield Chunk(str(path), offset, len(lines), number, 0)
                number, offset = number + len(lines), offset + sum(map(len, lines))
                lines = list(islice(handle, ROWS_PER_BLOCK))

    def records(self, chunk: Chunk, source: PreferenceSource, *, images: bool) -> Iterator[Numbered]:
        path = Path(chunk.path)
        if is_compressed(path):
            yield from super().records(chunk, source, images=images)
            return
        with refusing_damage(path), path.open("rb") as handle:
            handle.seek(chunk.start)
            yield from _json_lines(islice(handle, chunk.num_rows), chunk.first_number)


def _json_lines(lines: Iterable[bytes], first_number: int) -> Iterator[Numbered]:
    for number, line in enumerate(lines, start=first_number):
        if content := _line(line, first=number == 1):
            yield number, _json_object(content)


def _line(line: bytes, *, first: bool) -> bytes:
    return (line.removeprefix(codecs.BOM_UTF8) if first else line).strip()


def _json_object(line: bytes) -> Any:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return not_utf8(error)
    except (ValueError, RecursionError) as error:  # the latter: deep nesting
        return ValueError(f"is not JSON: {error}")
    return _object(values)


def _object(values: Any) -> Any:
    return values if isinstance(values, dict) else ValueError(f"must be an object, got {type(values).__name__}")


def not_utf8(error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"is not UTF-8 (byte {error.object[error.start]:#04x})")


class JsonList(Reader):
    """A JSON list of objects, read item by item; objects that follow each other without a list are read too."""

    def columns(self, path: Path, source: PreferenceSource) -> Collection[str]:
        objects = [values for values in islice(self._items(path), FIRST_ROWS) if isinstance(values, dict)]
        return dict.fromkeys(name for values in objects for name in values)

    def rows(self, path: Path, source: PreferenceSource) -> Iterator[Numbered]:
        yield from enumerate(self._items(path), start=1)

    def _items(self, path: Path) -> Iterator[Any]:
        with refusing_damage(path), open_bytes(path) as handle:
            text = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape")
            try:
                yield from map(_object, json_items(text))
            except (ValueError, RecursionError) as error:  # nothing after the fault can be read
                raise PreferenceError(f"{path}: is not JSON: {error}; write it again, or one object per line") from None


def json_items(handle: io.TextIOBase) -> Iterator[Any]:
    """Items of a JSON list, or values that follow each other; memory holds one item.

    Raises:
        ValueError: the text is not JSON, is cut off, or an item exceeds `MAX_ITEM_CHARACTERS`.
    """
    decoder, text, number = json.JSONDecoder(), "", 0
    while not text and (more := handle.read(TEXT_AT_ONCE)):
        text = more.lstrip()
    in_list = text.startswith("[")
    start = int(in_list)
    while True:
        start = SPACE.match(text, start).end()  # type: ignore[union-attr]  # matches any text
        if start == len(text):
            text, start = handle.read(TEXT_AT_ONCE), 0
            if not text:
                if in_list:
                    raise ValueError(f"the list is cut off after item {number}")
                return
            continue
        if in_list and text[start] == "]":
            if (text[start + 1 :] + handle.read(TEXT_AT_ONCE)).strip():
                raise ValueError(f"text follows the list of {number} items")
            return
        try:
            item, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            more = handle.read(max(TEXT_AT_ONCE, len(text) - start)) if _may_be_cut(error, text) else ""
            if not more or len(text) - start > MAX_ITEM_CHARACTERS:
                raise ValueError(f"{error.msg} in item {number + 1}") from None
            text, start = text[start:] + more, 0
            continue
        number += 1
        yield item
        start = end


def _may_be_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text may make a value valid that the end of the text has cut off."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16


class Delimited(Reader):
    """A text table with a header.

    Args:
        delimiters: candidates; the one that finds most columns of the format, unless Excel's first line names one.
    """

    def __init__(self, *delimiters: str) -> None:
        self.delimiters = delimiters

    def columns(self, path: Path, source: PreferenceSource) -> Collection[str]:
        with refusing_damage(path), open_bytes(path) as handle:
            _, header = next(self._lines(handle, source), (0, None))
        if header is None or isinstance(header, ValueError):
            return []
        if not header:
            raise PreferenceError(f"{path}: must name its columns in its first line, which is empty")
        if twice := [name for name in source.wanted(header) if header.count(name) > 1]:
            raise PreferenceError(f"{path}: has column {', '.join(map(shown, twice))} twice; rename or remove one")
        return header

    def rows(self, path: Path, source: PreferenceSource) -> Iterator[Numbered]:
        with refusing_damage(path), open_bytes(path) as handle:
            lines = self._lines(handle, source)
            _, header = next(lines, (0, []))
            if isinstance(header, ValueError):
                raise PreferenceError(f"{path}: {header}")
            for number, fields in lines:
                if isinstance(fields, ValueError):
                    yield number, fields
                elif not any(fields):  # Excel writes empty rows as delimiters
                    continue
                elif len(fields) == len(header):
                    yield number, dict(zip(header, fields, strict=True))
                else:
                    reason = f"must have {len(header)} fields as the header, got {len(fields)}; quote text that holds"
                    yield number, ValueError(f"{reason} the delimiter")

    def _lines(self, handle: Any, source: PreferenceSource) -> Iterator[tuple[int, Any]]:
        csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARACTERS))  # images in base64

        def num_known(header: list[str]) -> int:
            return sum(name in header for name in source.wanted(header))

        header = True
        for place, fields in csv_records(handle, num_known, self.delimiters):
            if isinstance(fields, PromptError):
                yield int(place), ValueError(str(fields))
            else:
                yield int(place), [name.strip() for name in fields] if header else fields
            header = False


class RankedFolders(Reader):
    """A folder per prompt, with `prompt.txt` and images whose names begin with their rank, 0 for the best."""

    def columns(self, path: Path, source: PreferenceSource) -> Collection[str]:
        return source.layout.required

    def seeks(self, path: Path) -> bool:
        return True

    def chunks(self, path: Path, source: PreferenceSource) -> Iterator[Chunk]:
        yield Chunk(str(path), 0, 1, 1, 0)

    def rows(self, path: Path, source: PreferenceSource) -> Iterator[Numbered]:
        yield 1, _ranked_folder(path)


def _ranked_folder(folder: Path) -> Any:
    try:
        refuse_special_file(folder / "prompt.txt")
        prompt = (folder / "prompt.txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return ValueError(f"`prompt.txt` cannot be read: {error}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS)
    ranks = [RANK.match(path.name) for path in paths]
    if unranked := [path.name for path, rank in zip(paths, ranks, strict=True) if rank is None]:
        return ValueError(f"names must start with the rank, 0 for the best, got {', '.join(unranked[:3])}")
    if len(paths) < 2:
        return ValueError(f"must hold at least 2 images, got {len(paths)}")
    return {
        "prompt": prompt,
        "images": [path.name for path in paths],
        "labels": [-float(rank[1]) for rank in ranks if rank],
    }

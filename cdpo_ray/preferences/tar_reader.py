"""Reader of webdataset archives; nothing is extracted, and the names of members never become paths."""

import io
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cdpo_ray.preferences.reader import Chunk, Reader, open_bytes, refusing_damage
from cdpo_ray.preferences.rows import Numbered, PreferenceSource
from cdpo_ray.preferences.text_readers import FIRST_ROWS, not_utf8

MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
"""Key and field of a member's name: a sample's members share the name up to the first dot."""
ALL_COLUMNS = "json"
"""Field with the values of several columns."""
BUFFER_BYTES = 2**20


class Tar(Reader):
    """Neighbouring members with one key are a row.

    A member ``<key>.<column>.<extension>`` holds a column: an image, JSON if the extension is ``json``, or text. One
    without a column, such as ``<key>.txt``, holds the column ``txt``. ``<key>.json`` is an object with columns.
    Numbered members, such as ``<key>.0.jpg`` and ``<key>.1.jpg``, are the images in this order.
    """

    has_paths = False
    skips_images = True

    def columns(self, path: Path, source: PreferenceSource) -> Collection[str]:
        samples = islice(self._samples(path, source, lambda column: column == ALL_COLUMNS), FIRST_ROWS)
        return dict.fromkeys(name for values in samples if isinstance(values, dict) for name in values)

    def seeks(self, path: Path) -> bool:
        return True

    def chunks(self, path: Path, source: PreferenceSource) -> Iterator[Chunk]:
        if num_samples := sum(1 for _ in self._samples(path, source, lambda column: False)):
            yield Chunk(str(path), 0, num_samples, 1, 0)  # one: shards are small, and reading over images is slow

    def records(self, chunk: Chunk, source: PreferenceSource, *, images: bool) -> Iterator[Numbered]:
        columns = {ALL_COLUMNS, *(name for column in source.layout.names for name in source.spellings(column))}

        def is_wanted(column: str) -> bool:
            return images if _is_image(column, source) else column in columns

        yield from enumerate(self._samples(Path(chunk.path), source, is_wanted), start=1)

    def may_lack_images(self, chunk: Chunk, source: PreferenceSource) -> bool:
        def lacks_one(values: Any) -> bool:
            return isinstance(values, dict) and any(
                source.spelled(column, values) not in values for column in source.layout.images
            )

        return any(map(lacks_one, self._samples(Path(chunk.path), source, lambda column: column == ALL_COLUMNS)))

    def _samples(self, path: Path, source: PreferenceSource, reads: Callable[[str], bool]) -> Iterator[Any]:
        """Values of each sample by column, `None` for members that are not read; a `ValueError` if one is unreadable.

        Args:
            reads: whether to read the members of a column.
        """
        key, values, fields = None, dict[str, Any](), set[str]()
        fault: ValueError | None = None
        with refusing_damage(path), open_bytes(path) as file:
            for member, content in _members(file, source.max_image_bytes):
                name = MEMBER.match(member.name)
                if name is None:
                    continue
                if name[1] != key:
                    if key is not None:
                        yield fault or _with_list(values, source)
                    key, values, fields, fault = name[1], {}, set(), None
                column, _, extension = name[2].rpartition(".")
                column = column or extension
                if name[2] in fields:
                    fault = ValueError(f"has the member `{name[2]}` twice")
                fields.add(name[2])
                try:
                    found = _columns(column, extension.lower(), content(), source) if reads(column) else {column: None}
                except UnicodeDecodeError as error:
                    fault, found = not_utf8(error), {}
                except (ValueError, RecursionError) as error:
                    found = {column: ValueError(f"`{name[2]}` {error}")}
                # A member of a column is used rather than what the object with all columns says of it.
                values = found | values if column == ALL_COLUMNS else values | found
            if key is not None:
                yield fault or _with_list(values, source)


def _is_image(column: str, source: PreferenceSource) -> bool:
    return column in source.image_names or column.isdecimal()


def _with_list(values: dict[str, Any], source: PreferenceSource) -> dict[str, Any]:
    """Add the list of the numbered images, if the format has one."""
    (column, *others), layout = source.layout.images, source.layout
    if others or layout.group or source.spelled(column, values) in values:
        return values
    numbered = sorted(filter(str.isdecimal, values), key=int)
    return values | ({column: [values[name] for name in numbered]} if numbered else {})


def _columns(column: str, extension: str, content: bytes, source: PreferenceSource) -> dict[str, Any]:
    """Columns of a member's content."""
    if _is_image(column, source) and extension != "json":
        return {column: content}
    text = content.decode("utf-8-sig")
    if extension != "json":
        return {column: text}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    return found if column == ALL_COLUMNS and isinstance(found, dict) else {column: found}


def _members(file: Any, max_bytes: int) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Regular files of an archive, and functions that read them.

    Raises:
        tarfile.TarError: the archive is damaged, which `tarfile` ignores after the first member.
    """
    handle = _BoundedReads(file, max_bytes)
    try:
        archive, end = tarfile.TarFile(fileobj=handle), -1  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            if archive.offset <= end or member.size < 0:
                raise tarfile.ReadError("an entry has an impossible size")
            end = archive.offset
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.isreg():
                yield member, lambda member=member: _content(handle, member, max_bytes)  # type: ignore[misc]
        handle.seek(archive.offset)
        if handle.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"damaged after {archive.offset:,} bytes")
    except tarfile.TarError as error:
        raise OSError(str(error)) from None


def _content(handle: "_BoundedReads", member: tarfile.TarInfo, max_bytes: int) -> bytes:
    if member.issparse():
        raise ValueError("is a sparse file")
    if member.size > max_bytes:
        raise ValueError(f"has {member.size:,} bytes, more than {max_bytes:,}")
    handle.seek(member.offset_data)
    return handle.read(member.size)


class _BoundedReads:
    """A file for `tarfile`, which would read a header of any size into memory.

    Args:
        max_bytes: maximum number of bytes of one read.
    """

    def __init__(self, file: Any, max_bytes: int) -> None:
        self.file = io.BufferedReader(file, BUFFER_BYTES)  # to step back by a block without decompressing again
        self.max_bytes = max(max_bytes, BUFFER_BYTES)

    def read(self, size: int) -> bytes:
        if size > self.max_bytes:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)

    def seek(self, offset: int) -> int:
        return self.file.seek(offset)

    def tell(self) -> int:
        return self.file.tell()

"""What a reader of preference files does; one subclass per kind of file."""

import gzip
import sys
import zlib
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.rows import Numbered, PreferenceSource

ROWS_PER_BLOCK = 256  # minimum number of rows per task
MAX_PARTS = 16
"""Number of chunks of a file that can only be read from its start: each chunk reads over those before it."""


@dataclass(frozen=True)
class Chunk:
    """Rows that are read together.

    Attributes:
        path: of the file or ranked folder.
        start: where the reader finds the first row: a byte offset, or the index of a row group or record batch; 0 if it
            reads from the start of the file.
        num_rows: number of rows or lines; lines may be empty.
        first_number: number of the first row in its file, from 1.
        first_index: index of the first row in all files, from 0.
    """

    path: str
    start: int
    num_rows: int
    first_number: int
    first_index: int


def row_at(chunks: Sequence[Chunk], index: int) -> tuple[str, int]:
    """File or ranked folder of a row, and its number there from 1.

    Args:
        chunks: in the order of the files.
        index: index of the row in all files, from 0.
    """
    chunk = chunks[bisect_right(chunks, index, key=lambda each: each.first_index) - 1]
    return chunk.path, chunk.first_number + index - chunk.first_index


def blocks_of(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Group chunks, in order, into blocks of one task each: a single ranked folder would be too small."""
    block: list[Chunk] = []
    for chunk in chunks:
        block.append(chunk)
        if sum(one.num_rows for one in block) >= ROWS_PER_BLOCK:
            yield block
            block = []
    if block:
        yield block


class Reader:
    """Rows of one kind of file; this class is for files that can only be read from their start."""

    has_paths = True
    """Whether rows may name image files."""
    skips_images = False
    """Whether rows can be read without their images."""

    def columns(self, path: Path, source: PreferenceSource) -> Collection[str]:
        """Columns of the first rows; empty if no row can be read.

        Raises:
            PreferenceError: the file is of another kind, or damaged.
        """
        raise NotImplementedError

    def rows(self, path: Path, source: PreferenceSource) -> Iterator[Numbered]:
        """All rows of a file."""
        raise NotImplementedError

    def seeks(self, path: Path) -> bool:
        """Whether a chunk is read without reading over those before it."""
        return False

    def chunks(self, path: Path, source: PreferenceSource) -> Iterator[Chunk]:
        """Chunks to read a whole file by, without `Chunk.first_index`; one of unknown length if it cannot seek."""
        yield Chunk(str(path), 0, sys.maxsize, 1, 0)

    def records(self, chunk: Chunk, source: PreferenceSource, *, images: bool) -> Iterator[Numbered]:
        """Rows of a chunk; blank ones are left out.

        Args:
            images: whether to read the images, if the reader can leave them out.
        """
        for number, values in self.rows(Path(chunk.path), source):
            if number >= chunk.first_number + chunk.num_rows:
                return
            if number >= chunk.first_number:
                yield number, values

    def may_lack_images(self, chunk: Chunk, source: PreferenceSource) -> bool:
        """Whether a row may lack an image, or name a missing file; may be answered without reading images."""
        return True

    def image_paths(self, chunk: Chunk, source: PreferenceSource) -> Iterator[Any]:
        """Values of the rows, in which only the paths of images matter."""
        if self.has_paths:
            yield from (values for _, values in self.records(chunk, source, images=True))

    def warnings(self, path: Path, source: PreferenceSource) -> Iterator[str]:
        """Warnings about a file that is slow to read."""
        yield from ()


def parts_of(whole: Chunk, num_rows: int) -> Iterator[Chunk]:
    """Chunks, to be read in parallel, of a file that can only be read from its start."""
    size = max(ROWS_PER_BLOCK, -(-num_rows // MAX_PARTS))
    for start in range(0, num_rows, size):
        yield replace(whole, num_rows=min(size, num_rows - start), first_number=start + 1)


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Turn errors of reading a damaged file into one that names it.

    Raises:
        PreferenceError: the file is unreadable.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise PreferenceError(f"{path}: cannot be read: {reason}; download or write it again") from None


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in (".gz", ".tgz")


def open_bytes(path: Path) -> Any:
    """Open a file for reading bytes, decompressed if its name ends in ``.gz`` or ``.tgz``."""
    return gzip.open(path) if is_compressed(path) else path.open("rb")

"""Preference files -> rows with preference and image locations; imports neither torch nor ray, opens no image."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.locating import locate, reader_of
from cdpo_ray.preferences.reader import Chunk, parts_of
from cdpo_ray.preferences.rows import Fault, Numbered, PreferenceSource, Row, grouped, row_of
from cdpo_ray.preferences.values import image_of, name_of
from cdpo_ray.store import files_sha256

FAULTS_SHOWN = 20
ROWS_SHOWN = 3
MAX_HELD_BYTES = 2**26
"""Size of a file whose rows of one ranking may be apart, because its rows are held in memory."""


@dataclass
class Scan:
    """Contents of all files, without the images.

    Attributes:
        chunks: chunks to import.
        prompts: prompt of each row to import.
        num_files, num_rows: total numbers.
        num_tied, num_unlabelled: numbers of rows without a preference, which are skipped.
        num_samples: maximum number of images per row.
        tied, unlabelled: file and number of the first of those rows.
        faults: unreadable rows.
        warnings: about files that are slow to read.
    """

    chunks: list[Chunk] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    num_files: int = 0
    num_rows: int = 0
    num_tied: int = 0
    num_unlabelled: int = 0
    num_samples: int = 2
    tied: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, chunks: Iterable[Chunk]) -> None:
        """Append the next chunks, with their `Chunk.first_index`."""
        for chunk in chunks:
            last = self.chunks[-1] if self.chunks else None
            self.chunks.append(replace(chunk, first_index=last.first_index + last.num_rows if last else 0))

    @property
    def counts(self) -> str:
        """Summary of the rows, for people."""
        return (
            f"{self.num_rows:,} rows: {len(self.prompts):,} with a preference, {self.num_tied:,} tied,"
            f" {self.num_unlabelled:,} unlabelled, {len(self.faults):,} cannot be read"
        )

    def lines(self, *, with_faults: bool = True) -> list[str]:
        """Lines for people: the counts, the first rows of each kind that is skipped, and warnings."""
        first: dict[str, Sequence[str | Fault]] = {
            "tied": self.tied,
            "unlabelled": self.unlabelled,
            "cannot be read": self.faults if with_faults else [],
        }
        return [
            f"{self.num_files:,} file{'s' * (self.num_files != 1)}, {self.counts}",
            *(f"{kind}: {row}" for kind, rows in first.items() for row in rows[:ROWS_SHOWN]),
            *self.warnings,
        ]

    def refuse_unusable(self, source: "PreferenceSource", max_bad_fraction: float) -> None:
        """Refuse files with too many unreadable rows, or without a preference.

        Args:
            max_bad_fraction: maximum share of unreadable rows.

        Raises:
            PreferenceError: with their number, and file and row of the first ones.
        """
        where = f"`preferences.path` {source.path}"
        if len(self.faults) > max_bad_fraction * self.num_rows:
            listed = "".join(f"\n  {fault}" for fault in self.faults[:FAULTS_SHOWN])
            more = f"\n  and {len(self.faults) - FAULTS_SHOWN:,} more" if len(self.faults) > FAULTS_SHOWN else ""
            raise PreferenceError(
                f"{where}: {len(self.faults):,} of {self.num_rows:,} rows cannot be read, more than"
                f" `preferences.max_bad_fraction` = {max_bad_fraction}; fix or remove them, or raise it:{listed}{more}"
            )
        if not self.prompts:
            raise PreferenceError(f"{where}: must have a row with a preference, got {self.counts}")


def scan(source: PreferenceSource, *, with_images: bool = False) -> Scan:
    """Read everything but the images.

    Args:
        with_images: check that each image to import exists; images are not opened.

    Raises:
        PreferenceError: if there is no file, or a file is unreadable or lacks a column.
    """
    source.check()
    paths, warnings = locate(source)
    found = Scan(num_files=len(paths), warnings=warnings)
    for path in paths:
        reader = reader_of(path)
        if present := reader.columns(path, source):
            source.refuse_missing(path, present)
        found.warnings += reader.warnings(path, source)
        for chunk in _chunks(path, source):
            _scan_chunk(chunk, source, found, with_images=with_images)
    if not found.num_rows:
        raise PreferenceError(f"`preferences.path` {source.path}: must have rows, got none")
    return found


def fingerprint(source: PreferenceSource) -> str:
    """SHA-256 of all files and the images that they name, which identifies a finished import's input.

    Names are relative to the files' common folder, so that a set may be moved.

    Raises:
        PreferenceError: as `scan`.
        StoreError: if a file changed while it was read.
    """
    source.check()
    paths, files = [path.absolute() for path in locate(source)[0]], dict[str, Path]()
    root = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        name = str(path.relative_to(root))
        if path.is_dir():
            files |= {f"{name}/{file.name}": file for file in sorted(path.iterdir())}
        else:
            files |= {name: path}
            files |= {f"{name}: {os.path.relpath(image, path.parent)}": Path(image) for image in _images(path, source)}
    return files_sha256(files, where=f"`preferences.path` {source.path}")


def _images(path: Path, source: PreferenceSource) -> list[str]:
    """Paths of the images that a file names; images inside the file are not read."""
    reader, found = reader_of(path), set[str]()
    if present := reader.columns(path, source):
        source.refuse_missing(path, present)
    for chunk in reader.chunks(path, source) if reader.has_paths else ():
        for values in reader.image_paths(chunk, source):
            for name in source.image_names & {*values} if isinstance(values, dict) else ():
                items = values[name] if isinstance(values[name], list) else [values[name]]
                for item in items:
                    with contextlib.suppress(ValueError):  # the import reports it
                        image = image_of({name: item}, name, path.parent)
                        found |= {image} if isinstance(image, str) else set()
    return sorted(found)


def read_rows(chunk: Chunk, source: PreferenceSource) -> Iterator[Row | Fault]:
    """Yield the rows of a chunk to import, with the bytes or paths of their images; ties are skipped."""
    folder = _folder(chunk)
    for number, values in _values(chunk, source, images=True):
        row = row_of(chunk.path, number, values, source, folder=folder)
        if isinstance(row, Fault) or (row is not None and len(set(row.labels)) > 1):
            yield row


def _scan_chunk(chunk: Chunk, source: PreferenceSource, found: Scan, *, with_images: bool) -> None:
    """Add a chunk's rows to ``found``."""
    reader, folder, last = reader_of(Path(chunk.path)), _folder(chunk), 0
    images = not reader.skips_images or (
        with_images and any(reader.may_lack_images(part, source) for part in _parts(chunk, source))
    )
    for number, values in _values(chunk, source, images=images):
        found.num_rows += 1
        last = number
        row = row_of(chunk.path, number, values, source, images=images, folder=folder)
        if with_images and isinstance(row, Row) and (missing := _missing_images(row)):
            row = missing
        if isinstance(row, Fault):
            found.faults.append(row)
        elif row is None:
            found.num_unlabelled += 1
            _keep_first(found.unlabelled, f"{chunk.path}:{number}")
        elif len(set(row.labels)) == 1:
            found.num_tied += 1
            _keep_first(found.tied, f"{chunk.path}:{number}")
        else:
            found.prompts.append(row.prompt)
            found.num_samples = max(found.num_samples, len(row.labels))
    if reader.seeks(Path(chunk.path)):
        found.add([chunk])
    elif source.layout.group:
        num_rows = max((number for number, _ in reader.rows(Path(chunk.path), source)), default=0)
        found.add([replace(chunk, num_rows=num_rows)] if num_rows else [])
    else:
        found.add(parts_of(chunk, last))


def _missing_images(row: Row) -> Fault | None:
    missing = [image for image in row.images if isinstance(image, str) and not os.path.exists(image)]
    return Fault(row.file, row.number, f"{name_of(missing[0])}: no such file") if missing else None


def _keep_first(rows: list[str], row: str) -> None:
    if len(rows) < ROWS_SHOWN:
        rows.append(row)


def _folder(chunk: Chunk) -> Path | None:
    """Base of the paths of images; `None`: the file must hold them."""
    path = Path(chunk.path)
    if not reader_of(path).has_paths:
        return None
    return path if path.is_dir() else path.parent


def _chunks(path: Path, source: PreferenceSource) -> list[Chunk]:
    """Chunks of a file; one if rows are joined, because rows of one ranking may be in several chunks of the reader."""
    parts = list(reader_of(path).chunks(path, source))
    if source.layout.group and parts:
        return [replace(parts[0], num_rows=sum(part.num_rows for part in parts))]
    return parts


def _parts(chunk: Chunk, source: PreferenceSource) -> Iterator[Chunk]:
    """Chunks of the reader that a chunk consists of."""
    reader, path = reader_of(Path(chunk.path)), Path(chunk.path)
    is_whole = source.layout.group and reader.seeks(path)
    yield from reader.chunks(path, source) if is_whole else [chunk]


def _values(chunk: Chunk, source: PreferenceSource, *, images: bool) -> Iterator[Numbered]:
    """Yield number and values of each row, or a `ValueError` if it is unreadable; blank rows are skipped."""
    path = Path(chunk.path)
    reader = reader_of(path)
    rows = (row for part in _parts(chunk, source) for row in reader.records(part, source, images=images))
    if source.layout.group:
        return grouped(rows, source, in_any_order=path.stat().st_size <= MAX_HELD_BYTES)
    return rows

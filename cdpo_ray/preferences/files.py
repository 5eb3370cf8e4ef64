"""Preference files -> rows with preference and image locations; imports neither torch nor ray, opens no image."""

import codecs
import contextlib
import glob
import gzip
import json
import os
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.config.section import looked_for
from cdpo_ray.errors import PreferenceError, printable
from cdpo_ray.preferences.formats import (
    FORMATS,
    is_parquet,
    is_table,
    missing_columns,
    no_tables,
    other_kind,
    with_small_row_groups,
)
from cdpo_ray.preferences.values import URL, image_of, is_false, name_of, number_of, prompt_of
from cdpo_ray.store import files_sha256, refuse_special_file

ROWS_PER_BLOCK = 256  # minimum number of rows per task
ROWS_PER_BATCH = 16  # of Parquet rows with images
PAGE_BYTES = 2**20
"""Buffer per Parquet column, instead of the column's whole chunk of a row group."""
MAX_ROW_GROUP_BYTES = 10**9
FAULTS_SHOWN = 20
MAX_FAULT_SHOWN = 2000  # characters
ROWS_SHOWN = 3
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
RANK = re.compile(r"^(\d+)")


@dataclass(frozen=True)
class PreferenceSource:
    """Location and format of preference files.

    Attributes:
        path: a Parquet or JSONL file, a folder of them, or a pattern (``data/**/train-*.parquet``); for
            ``ranked_folders``, their parent folder.
        format: key of `FORMATS`.
        columns: column name of the format -> name in the files, for renamed columns.
        difficulty: column that ranks the images: ``label``, the files' ``score`` or ``rank`` (0 is best).
    """

    path: str
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    difficulty: str = "label"

    def column(self, name: str) -> str:
        """Name of a column in the files."""
        return self.columns.get(name, name)


@dataclass(frozen=True)
class Row:
    """A judged group of images.

    Attributes:
        file, number: path of the file and number of the line or row, from 1; 1 for a ranked folder.
        prompt: prompt of the images.
        images: bytes or path of each image.
        labels: label of each image, higher is preferred; equal in a tie.
        scores: score of each image that ranks them, higher is better; see `PreferenceSource.difficulty`.
    """

    file: str
    number: int
    prompt: str
    images: tuple[bytes | str, ...]
    labels: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Fault:
    """Reason why a row, or an image of it, is unusable."""

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.file}:{self.number}: {self.reason}", MAX_FAULT_SHOWN)


@dataclass(frozen=True)
class Chunk:
    """Rows that are read together.

    Attributes:
        path: of the file or ranked folder.
        start: byte offset of the first line, or index of the Parquet row group.
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
    columns = FORMATS[source.format]
    if columns and (unknown := [name for name in source.columns if name not in columns.names]):
        raise PreferenceError(
            f"`preferences.columns` must map some of {', '.join(columns.names)} to names in the files,"
            f" got {', '.join(unknown)}"
        )
    found = Scan()
    for path in files_of(source):
        found.num_files += 1
        found.warnings += _large_row_groups(path, source)
        for chunk in _chunks(path, source):
            _scan_chunk(chunk, source, found, with_images=with_images)
    if not found.num_rows:
        raise PreferenceError(f"`preferences.path` {source.path}: must have rows, got none")
    return found


def files_of(source: PreferenceSource) -> list[Path]:
    """Files or ranked folders, sorted by name.

    Raises:
        PreferenceError: if there are none.
    """
    where = f"`preferences.path` {source.path}"
    if URL.match(source.path):
        raise PreferenceError(f"{where}: is a URL; download the files, and give their folder")
    if source.format == "ranked_folders":
        found = sorted(Path(path) for path in glob.glob(f"{glob.escape(source.path)}/*/"))
        wanted = "a folder that holds one folder per prompt"
    else:
        found = _tables(source.path)
        wanted = "a Parquet or JSONL file, a folder of them, or a pattern such as data/**/train-*.parquet"
    if not found:
        raise PreferenceError(f"{where}: not found: {looked_for(source.path)}; give {wanted}")
    return found


def _tables(text: str) -> list[Path]:
    """Files of a path, a folder or a pattern, without hidden ones; each once, even if several links lead to it.

    Raises:
        PreferenceError: if a folder holds none.
    """
    found: dict[Path, Path] = {}
    matches = list(map(Path, _matches(text)))
    for path in matches:
        files = [path]
        if path.is_dir():
            within = map(Path, glob.glob(f"{glob.escape(str(path))}/**", recursive=True))
            present = [file for file in within if file.is_file()]
            files = [file for file in present if is_table(file)]
            if not files and matches == [path]:
                raise no_tables(path, present)
        elif not path.is_file():
            raise PreferenceError(f"{path}: is not a regular file, or is a broken link; give a file")
        for table in files:
            found.setdefault(table.resolve(), table)
    return sorted(found.values())


def _matches(text: str) -> list[str]:
    """Paths that match a path or pattern; existing parents are taken literally, so that `set [v2]/*` is found."""
    existing = next(path for path in (Path(text), *Path(text).parents) if os.path.exists(path))
    pattern = Path(text).relative_to(existing)
    return sorted(glob.glob(str(Path(glob.escape(str(existing)), pattern)), recursive=True))


def fingerprint(source: PreferenceSource) -> str:
    """SHA-256 of all files and the images that they name, which identifies a finished import's input.

    Names are relative to the files' common folder, so that a set may be moved.

    Raises:
        PreferenceError: as `scan`.
        StoreError: if a file changed while it was read.
    """
    paths, files = [path.absolute() for path in files_of(source)], dict[str, Path]()
    root = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        name = str(path.relative_to(root))
        if path.is_dir():
            files |= {f"{name}/{file.name}": file for file in sorted(path.iterdir())}
        else:
            named = sorted({image for chunk in _chunks(path, source) for image in _named_images(chunk, source)})
            files |= {name: path}
            files |= {f"{name}: {os.path.relpath(image, path.parent)}": Path(image) for image in named}
    return files_sha256(files, where=f"`preferences.path` {source.path}")


def _named_images(chunk: Chunk, source: PreferenceSource) -> Iterator[str]:
    """Paths of the images that rows name; images inside the file are not read."""
    path, columns = Path(chunk.path), FORMATS[source.format]
    assert columns is not None, "a ranked folder holds its images"
    names = [source.column(name) for name in columns.images]
    if is_parquet(path):
        with _refusing_damage(path), _open_parquet(path, source) as file:
            leaves = [leaf for name in names if (leaf := _path_leaf(file.schema_arrow.field(name)))]
            batches = file.iter_batches(row_groups=[chunk.start], columns=leaves) if leaves else []
            rows = [_record(batch, row) for batch in batches for row in range(batch.num_rows)]
    else:
        rows = [values for _, values in _values(chunk, source, images=True)]
    for row in rows:
        for name in names if isinstance(row, dict) else ():
            with contextlib.suppress(ValueError):  # the import reports it
                image = image_of(row, name, path.parent)
                if isinstance(image, str):
                    yield image


def _path_leaf(field: pa.Field) -> str | None:
    """Parquet leaf column with the paths of a column of images; `None`: it holds bytes only."""
    if pa.types.is_struct(field.type):
        return f"{field.name}.path" if field.type.get_field_index("path") >= 0 else None
    return None if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type) else str(field.name)


def read_rows(chunk: Chunk, source: PreferenceSource) -> Iterator[Row | Fault]:
    """Yield the rows of a chunk to import, with the bytes or paths of their images; ties are skipped."""
    for number, values in _values(chunk, source, images=True):
        row = _row(chunk.path, number, values, source)
        if isinstance(row, Fault) or (row is not None and len(set(row.labels)) > 1):
            yield row


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


def _scan_chunk(chunk: Chunk, source: PreferenceSource, found: Scan, *, with_images: bool) -> None:
    """Add a chunk's rows to ``found``."""
    last = found.chunks[-1] if found.chunks else None
    found.chunks.append(replace(chunk, first_index=last.first_index + last.num_rows if last else 0))
    reads_images = not is_parquet(Path(chunk.path)) or (with_images and _may_lack_images(chunk, source))
    for number, values in _values(chunk, source, images=reads_images):
        found.num_rows += 1
        row = _row(chunk.path, number, values, source, images=reads_images)
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


def _may_lack_images(chunk: Chunk, source: PreferenceSource) -> bool:
    """Whether a Parquet row group names image files, or has null images by its statistics; their bytes are not read."""
    file, columns = _open_parquet(Path(chunk.path), source), FORMATS[source.format]
    assert columns is not None, "a ranked folder is not a table"
    names = [source.column(name) for name in columns.images]
    kinds = [file.schema_arrow.field(name).type for name in names]
    if any(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds):
        return True
    group = file.metadata.row_group(chunk.start)
    leaves = [group.column(number) for number in range(group.num_columns)]
    wanted = {leaf for name in names for leaf in (name, f"{name}.bytes")}
    counted = [leaf.statistics for leaf in leaves if leaf.path_in_schema in wanted and leaf.is_stats_set]
    return any(statistics.null_count for statistics in counted)


def _missing_images(row: Row) -> Fault | None:
    missing = [image for image in row.images if isinstance(image, str) and not os.path.exists(image)]
    return Fault(row.file, row.number, f"{name_of(missing[0])}: no such file") if missing else None


def _keep_first(rows: list[str], row: str) -> None:
    if len(rows) < ROWS_SHOWN:
        rows.append(row)


def _large_row_groups(path: Path, source: PreferenceSource) -> Iterator[str]:
    """Warning about row groups that are too large for one task."""
    if source.format == "ranked_folders" or not is_parquet(path):
        return
    metadata = _open_parquet(path, source).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    largest = max(groups, key=lambda group: group.total_byte_size, default=None)
    if largest and largest.total_byte_size > MAX_ROW_GROUP_BYTES:
        yield (
            f"{path}: has a row group of {largest.num_rows:,} rows and {largest.total_byte_size / 1e9:.1f} GB, which"
            f" a single task reads slowly and with much memory; write smaller ones: {with_small_row_groups(path)}"
        )


def _chunks(path: Path, source: PreferenceSource) -> Iterator[Chunk]:
    if source.format == "ranked_folders":
        yield Chunk(str(path), 0, 1, 1, 0)
    elif is_parquet(path):
        file = _open_parquet(path, source)
        number = 1
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            yield Chunk(str(path), group, num_rows, number, 0)
            number += num_rows
    elif is_table(path):
        with _refusing_damage(path), _open_lines(path) as handle:
            lines, number, offset = list(islice(handle, ROWS_PER_BLOCK)), 1, 0
            _refuse_other_objects(path, lines, source)
            if lines and _is_compressed(path):  # one chunk: seeking needs decompression of everything before
                yield Chunk(str(path), 0, len(lines) + sum(1 for _ in handle), 1, 0)
                return
            while lines:
                yield Chunk(str(path), offset, len(lines), number, 0)
                number, offset = number + len(lines), offset + sum(map(len, lines))
                lines = list(islice(handle, ROWS_PER_BLOCK))
    else:
        raise other_kind(path)


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _open_lines(path: Path) -> Any:
    return gzip.open(path) if _is_compressed(path) else path.open("rb")


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    """Turn errors of reading a damaged file into one that names it.

    Raises:
        PreferenceError: if the file is unreadable.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise PreferenceError(f"{path}: cannot be read: {reason}; download or write it again") from None


def _values(chunk: Chunk, source: PreferenceSource, *, images: bool) -> Iterator[tuple[int, Any]]:
    """Yield number and columns of each row, or a `ValueError` if it is unreadable; empty lines are skipped."""
    path = Path(chunk.path)
    if source.format == "ranked_folders":
        yield 1, _ranked_folder(path)
        return
    with _refusing_damage(path):
        if is_parquet(path):
            file = _open_parquet(path, source)
            columns = _wanted(source, images=images) + _has_label(source, file)
            batch_size = {"batch_size": ROWS_PER_BATCH} if images else {}
            number = chunk.first_number
            for batch in file.iter_batches(**batch_size, row_groups=[chunk.start], columns=columns):
                for row in range(batch.num_rows):
                    yield number, _record(batch, row)
                    number += 1
        else:
            with _open_lines(path) as handle:
                handle.seek(chunk.start)
                for number in range(chunk.first_number, chunk.first_number + chunk.num_rows):
                    if line := _line(handle.readline(), first=number == 1):
                        yield number, _json_object(line)


def _record(batch: pa.RecordBatch, row: int) -> Any:
    try:
        return {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _line(line: bytes, *, first: bool) -> bytes:
    return (line.removeprefix(codecs.BOM_UTF8) if first else line).strip()


def _json_object(line: bytes) -> Any:
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except (ValueError, RecursionError) as error:  # the latter: deep nesting
        return ValueError(f"is not JSON: {error}")
    return values if isinstance(values, dict) else ValueError(f"must be an object, got {type(values).__name__}")


def _not_utf8(error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"is not UTF-8 (byte {error.object[error.start]:#04x})")


def _refuse_other_objects(path: Path, lines: Sequence[bytes], source: PreferenceSource) -> None:
    """Refuse a file if a required column is in none of its first lines."""
    stripped = [_line(line, first=number == 0) for number, line in enumerate(lines)]
    objects = [values for values in map(_json_object, filter(None, stripped)) if isinstance(values, dict)]
    present = dict.fromkeys(name for values in objects for name in values)
    if present and (absent := [name for name in _wanted(source, images=True) if name not in present]):
        raise missing_columns(path, absent, present)
    if not present and stripped and stripped[0].startswith(b"["):
        raise other_kind(path)


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
    return {"prompt": prompt, "images": list(map(str, paths)), "labels": [-float(rank[1]) for rank in ranks if rank]}


def _row(file: str, number: int, values: Any, source: PreferenceSource, *, images: bool = True) -> Row | Fault | None:
    """Parse a row; a fault if invalid, `None` if unlabelled. Ties, and rows without ``images``, have no images."""
    try:
        if isinstance(values, ValueError):
            raise values
        columns = FORMATS[source.format]
        if columns is None:
            labels = tuple(values["labels"])
            return Row(file, number, prompt_of(values, "prompt"), tuple(values["images"]), labels, labels)

        def numbers(names: tuple[str, ...]) -> tuple[float, ...]:
            return tuple(number_of(values, source.column(name)) for name in names)

        if columns.has_label and is_false(values.get(source.column(columns.has_label))):
            return None
        prompt = prompt_of(values, source.column(columns.prompt))
        labels = (1.0, 0.0) if columns.labels is None else numbers(columns.labels)
        scores = labels
        if source.difficulty == "score":
            scores = numbers(columns.scores)
        elif source.difficulty == "rank":
            scores = tuple(-rank for rank in numbers(columns.ranks))
        names = columns.images if images and len(set(labels)) > 1 else ()
        found = tuple(image_of(values, source.column(name), Path(file).parent) for name in names)
        return Row(file, number, prompt, found, labels, scores)
    except ValueError as error:
        return Fault(file, number, str(error))


def _wanted(source: PreferenceSource, *, images: bool) -> list[str]:
    columns = FORMATS[source.format]
    assert columns is not None, "a ranked folder is not a table"
    wanted = [columns.prompt, *(columns.labels or ()), *(columns.images if images else ())]
    wanted += {"label": (), "score": columns.scores, "rank": columns.ranks}[source.difficulty]
    return [source.column(name) for name in wanted]


def _has_label(source: PreferenceSource, file: pq.ParquetFile) -> list[str]:
    """Column that marks labelled rows, if the file has it."""
    columns = FORMATS[source.format]
    name = source.column(columns.has_label) if columns and columns.has_label else None
    return [name] if name and name in file.schema_arrow.names else []


def _open_parquet(path: Path, source: PreferenceSource) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path, buffer_size=PAGE_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise PreferenceError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    schema = file.schema_arrow
    columns = _wanted(source, images=True)
    if absent := [name for name in columns if name not in schema.names]:
        raise missing_columns(path, absent, schema.names)
    for name in columns:
        column = schema.field(name)
        if isinstance(column.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (column.metadata or {}):
            raise PreferenceError(
                f"{path}: column {name!r} holds objects of {column.type}, which may run code and were not read; write"
                " plain strings, numbers or bytes"
            )
    return file

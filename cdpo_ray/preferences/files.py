"""Preference files -> rows: which image of a prompt was preferred, and where the images lie.

Importable without torch and ray; images are not opened here.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.errors import PreferenceError
from cdpo_ray.store import files_sha256

ROWS_PER_BLOCK = 256  # read by one task
ROWS_AT_ONCE = 16  # of Parquet, whose rows hold images
FAULTS_SHOWN = 20
MAX_PATH = 4096
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
RANK = re.compile(r"^(\d+)")


@dataclass(frozen=True)
class Columns:
    """What a format calls its columns.

    Attributes:
        labels: none: the first image is the preferred one.
        scores, ranks: of the two images, if the file has them and they are asked for.
        has_label: false in rows that nobody judged.
    """

    prompt: str
    images: tuple[str, str]
    labels: tuple[str, str] | None
    scores: tuple[str, str]
    ranks: tuple[str, str]
    has_label: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        has_label = (self.has_label,) if self.has_label else ()
        return (self.prompt, *self.images, *(self.labels or ()), *self.scores, *self.ranks, *has_label)


FORMATS: dict[str, Columns | None] = {
    "pickapic": Columns(
        "caption",
        ("jpg_0", "jpg_1"),
        ("label_0", "label_1"),
        ("score_0", "score_1"),
        ("rank_0", "rank_1"),
        "has_label",
    ),
    "pairs": Columns(
        "prompt",
        ("chosen", "rejected"),
        None,
        ("chosen_score", "rejected_score"),
        ("chosen_rank", "rejected_rank"),
    ),
    "ranked_folders": None,
}
"""A folder a prompt has no columns: `prompt.txt`, and images whose names begin with their rank, 0 the best."""


@dataclass(frozen=True)
class Source:
    """Where preferences lie and how they are read.

    Attributes:
        path: a Parquet or JSONL file, or several by a pattern (``data/train-*.parquet``); of ``ranked_folders``, the
            folder that holds them.
        format: a key of `FORMATS`.
        columns: our name of a column -> its name in the files, where it is another.
        difficulty: what ranks the images: ``label``, the files' ``score`` or the files' ``rank`` (0 the best).
    """

    path: str
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    difficulty: str = "label"

    def column(self, name: str) -> str:
        """Its name in the files."""
        return self.columns.get(name, name)


@dataclass(frozen=True)
class Row:
    """One judgement.

    Attributes:
        file, number: where it stands; lines and rows count from 1, of a ranked folder it is 1.
        images: bytes of each, or a path.
        labels: of each image, higher is preferred; equal in a tie.
        scores: of each image, higher is better: what ranks them, see `Source.difficulty`.
    """

    file: str
    number: int
    prompt: str
    images: tuple[bytes | str, ...]
    labels: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row, or with an image of it."""

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.reason}"


@dataclass(frozen=True)
class Chunk:
    """Rows that are read together.

    Attributes:
        start: byte offset of the first line, or the row group of Parquet.
        first_number: of the first row within its file.
        first_index: of the first row within all files.
    """

    path: str
    start: int
    num_rows: int
    first_number: int
    first_index: int


@dataclass
class Scan:
    """All files, without their images.

    Attributes:
        prompts: of each row that is to be imported.
        num_tied, num_unlabelled: rows without a preference, which are left out.
        num_samples: images of the row that has most.
        faults: rows that cannot be read.
    """

    chunks: list[Chunk] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    num_rows: int = 0
    num_tied: int = 0
    num_unlabelled: int = 0
    num_samples: int = 2
    faults: list[Fault] = field(default_factory=list)

    def refuse_faults(self) -> None:
        """Raise what `faults` says.

        Raises:
            PreferenceError: with the file and row of the first faults, and how many there are.
        """
        if self.faults:
            shown = "".join(f"\n  {fault}" for fault in self.faults[:FAULTS_SHOWN])
            more = f"\n  ... and {len(self.faults) - FAULTS_SHOWN} more" if len(self.faults) > FAULTS_SHOWN else ""
            raise PreferenceError(f"{len(self.faults)} rows cannot be read; mend or remove them:{shown}{more}")


def scan(source: Source) -> Scan:
    """Read everything but the images.

    Raises:
        PreferenceError: no file is there, a file cannot be read, or lacks a column.
    """
    columns = FORMATS[source.format]
    if columns and (unknown := [name for name in source.columns if name not in columns.names]):
        raise PreferenceError(
            f"`preferences.columns` must rename some of {', '.join(columns.names)} (our name: yours),"
            f" got {', '.join(unknown)}"
        )
    found = Scan()
    for path in files_of(source):
        for chunk in _chunks(path, source):
            _scan_chunk(chunk, source, found)
    if not found.num_rows:
        raise PreferenceError(f"`preferences.path` {source.path}: has no rows")
    return found


def files_of(source: Source) -> list[Path]:
    """The files, or the ranked folders, in the order of their names.

    Raises:
        PreferenceError: there is none.
    """
    if source.format == "ranked_folders":
        found = sorted(path for path in Path(source.path).glob("*") if path.is_dir())
        wanted = "a folder that holds a folder a prompt"
    else:
        found = sorted(Path(path) for path in glob.glob(source.path) if Path(path).is_file())
        wanted = "a Parquet or JSONL file, or a pattern such as data/train-*.parquet"
    if not found:
        raise PreferenceError(f"`preferences.path` {source.path}: nothing is there; give {wanted}")
    return found


def fingerprint(source: Source) -> str:
    """SHA-256 of all files, and of the images that they name: what a finished import is compared with.

    Names count from the folder that all files lie in, so that a set may be moved.

    Raises:
        PreferenceError: as `scan`.
        StoreError: a file was changed while it was read.
    """
    paths, files = [path.absolute() for path in files_of(source)], dict[str, Path]()
    root = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        name = str(path.relative_to(root))
        if path.is_dir():
            files |= {f"{name}/{file.name}": file for file in sorted(path.iterdir())}
        else:
            named = sorted({image for chunk in _chunks(path, source) for image in _named_images(chunk, source)})
            files |= {name: path} | {f"{name}: {image}": path.parent / image for image in named}
    return files_sha256(files, where=f"`preferences.path` {source.path}")


def _named_images(chunk: Chunk, source: Source) -> Iterator[str]:
    """Paths of images as a file of rows gives them; images that it holds itself are not read."""
    columns = FORMATS[source.format]
    assert columns is not None, "a ranked folder holds its images"
    names = [source.column(name) for name in columns.images]
    if Path(chunk.path).suffix == ".parquet":
        with _open_parquet(Path(chunk.path), source) as file:
            wanted = [leaf for name in names if (leaf := _path_leaf(file.schema_arrow.field(name)))]
            rows = file.read_row_group(chunk.start, columns=wanted).to_pylist() if wanted else []
    else:
        rows = [values for _, values in _values(chunk, source, images=True) if isinstance(values, dict)]
    for row in rows:
        for value in (row.get(name) for name in names):
            image = value.get("path") if isinstance(value, Mapping) else value
            if isinstance(image, str) and len(image) <= MAX_PATH:  # a longer one is the image itself
                yield image


def _path_leaf(field: pa.Field) -> str | None:
    """The column of Parquet that holds the paths of a column of images; ``None``: it holds bytes alone."""
    if pa.types.is_struct(field.type):
        return f"{field.name}.path" if field.type.get_field_index("path") >= 0 else None
    return None if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type) else str(field.name)


def read_rows(chunk: Chunk, source: Source) -> Iterator[Row | Fault]:
    """The rows of a chunk that are to be imported, with their images or the paths to them; ties are left out."""
    for number, values in _values(chunk, source, images=True):
        row = _row(chunk.path, number, values, source)
        if isinstance(row, Fault) or (row is not None and len(set(row.labels)) > 1):
            yield row


def blocks_of(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks that one task reads, in their order: a ranked folder alone would be too little for one."""
    block: list[Chunk] = []
    for chunk in chunks:
        block.append(chunk)
        if sum(one.num_rows for one in block) >= ROWS_PER_BLOCK:
            yield block
            block = []
    if block:
        yield block


def _scan_chunk(chunk: Chunk, source: Source, found: Scan) -> None:
    """Add what a chunk holds."""
    found.chunks.append(replace(chunk, first_index=found.num_rows))
    found.num_rows += chunk.num_rows
    for number, values in _values(chunk, source, images=False):
        row = _row(chunk.path, number, values, source, images=Path(chunk.path).suffix != ".parquet")
        if isinstance(row, Fault):
            found.faults.append(row)
        elif row is None:
            found.num_unlabelled += 1
        elif len(set(row.labels)) == 1:
            found.num_tied += 1
        else:
            found.prompts.append(row.prompt)
            found.num_samples = max(found.num_samples, len(row.labels))


def _chunks(path: Path, source: Source) -> Iterator[Chunk]:
    if source.format == "ranked_folders":
        yield Chunk(str(path), 0, 1, 1, 0)
    elif path.suffix == ".parquet":
        file = _open_parquet(path, source)
        number = 1
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            yield Chunk(str(path), group, num_rows, number, 0)
            number += num_rows
    elif path.suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as handle:
            number, offset = 1, 0
            while lines := [line for _, line in zip(range(ROWS_PER_BLOCK), handle, strict=False)]:
                yield Chunk(str(path), offset, len(lines), number, 0)
                number, offset = number + len(lines), offset + sum(map(len, lines))
    else:
        raise PreferenceError(f"{path}: must end in .parquet or .jsonl, got {path.suffix!r}")


def _values(chunk: Chunk, source: Source, *, images: bool) -> Iterator[tuple[int, Any]]:
    """Number and columns of each row; a `ValueError` in place of columns that cannot be read."""
    path = Path(chunk.path)
    if source.format == "ranked_folders":
        yield 1, _ranked_folder(path)
    elif path.suffix == ".parquet":
        file = _open_parquet(path, source)
        columns = _wanted(source, images=images) + _has_label(source, file)
        at_once = ROWS_AT_ONCE if images else None
        batches = file.iter_batches(
            **({"batch_size": at_once} if at_once else {}), row_groups=[chunk.start], columns=columns
        )
        number = chunk.first_number
        for batch in batches:
            for values in batch.to_pylist():
                yield number, values
                number += 1
    else:
        with path.open("rb") as handle:
            handle.seek(chunk.start)
            for number in range(chunk.first_number, chunk.first_number + chunk.num_rows):
                yield number, _json_object(handle.readline(), first=number == 1)


def _json_object(line: bytes, *, first: bool) -> Any:
    try:
        values = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"is not UTF-8 (byte {line[error.start]:#04x})")
    except ValueError as error:
        return ValueError(f"is not JSON: {error}")
    return values if isinstance(values, dict) else ValueError(f"must be an object, got {type(values).__name__}")


def _ranked_folder(folder: Path) -> Any:
    try:
        prompt = (folder / "prompt.txt").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return ValueError(f"`prompt.txt` cannot be read: {error}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_ENDINGS)
    ranks = [RANK.match(path.name) for path in paths]
    if unranked := [path.name for path, rank in zip(paths, ranks, strict=True) if rank is None]:
        return ValueError(f"names must begin with the rank, 0 the best, got {', '.join(unranked[:3])}")
    if len(paths) < 2:
        return ValueError(f"must hold at least 2 images, got {len(paths)}")
    return {"prompt": prompt, "images": list(map(str, paths)), "labels": [-float(rank[1]) for rank in ranks if rank]}


def _row(file: str, number: int, values: Any, source: Source, *, images: bool = True) -> Row | Fault | None:
    """A row, what is wrong with it, or none where nobody judged; without ``images``, they were not read."""
    try:
        if isinstance(values, ValueError):
            raise values
        columns = FORMATS[source.format]
        if columns is None:
            labels = tuple(values["labels"])
            return Row(file, number, _prompt(values, "prompt"), tuple(values["images"]), labels, labels)
        if columns.has_label and values.get(source.column(columns.has_label)) is False:
            return None
        prompt = _prompt(values, source.column(columns.prompt))
        labels = (1.0, 0.0) if columns.labels is None else _numbers(values, columns.labels, source)
        scores = labels
        if source.difficulty == "score":
            scores = _numbers(values, columns.scores, source)
        elif source.difficulty == "rank":
            scores = tuple(-rank for rank in _numbers(values, columns.ranks, source))
        names = columns.images if images else ()
        found = tuple(_image(values, source.column(name), Path(file).parent) for name in names)
        return Row(file, number, prompt, found, labels, scores)
    except ValueError as error:
        return Fault(file, number, str(error))


def _prompt(values: Mapping[str, Any], name: str) -> str:
    prompt = values.get(name)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"`{name}` must be a text that is not empty, got {prompt!r}")
    return prompt.strip()


def _numbers(values: Mapping[str, Any], names: tuple[str, str], source: Source) -> tuple[float, ...]:
    found = []
    for name in map(source.column, names):
        value = values.get(name)
        if not isinstance(value, int | float) or value != value:
            raise ValueError(f"`{name}` must be a number, got {value!r}")
        found.append(float(value))
    return tuple(found)


def _image(values: Mapping[str, Any], name: str, folder: Path) -> bytes | str:
    value = values.get(name)
    if isinstance(value, Mapping):  # how hub data sets keep an image
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return str(folder / value)
    if isinstance(value, bytes):
        return value
    raise ValueError(f"`{name}` must be an image's bytes or its path, got {type(value).__name__}")


def _wanted(source: Source, *, images: bool) -> list[str]:
    columns = FORMATS[source.format]
    assert columns is not None, "a ranked folder is no table"
    wanted = [columns.prompt, *(columns.labels or ()), *(columns.images if images else ())]
    wanted += {"label": (), "score": columns.scores, "rank": columns.ranks}[source.difficulty]
    return [source.column(name) for name in wanted]


def _has_label(source: Source, file: pq.ParquetFile) -> list[str]:
    """The column that says whether anybody judged, where the file has it."""
    columns = FORMATS[source.format]
    name = source.column(columns.has_label) if columns and columns.has_label else None
    return [name] if name and name in file.schema_arrow.names else []


def _open_parquet(path: Path, source: Source) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise PreferenceError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    schema = file.schema_arrow
    columns = _wanted(source, images=True)
    if absent := [name for name in columns if name not in schema.names]:
        raise PreferenceError(
            f"{path}: has no column {', '.join(map(repr, absent))}, but {', '.join(map(repr, schema.names))};"
            " say in `preferences.columns` what they are called"
        )
    for name in columns:
        column = schema.field(name)
        if isinstance(column.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (column.metadata or {}):
            raise PreferenceError(
                f"{path}: column {name!r} holds objects of {column.type}, which may run code when they are read; it was"
                " not read; write plain text, numbers or bytes"
            )
    return file

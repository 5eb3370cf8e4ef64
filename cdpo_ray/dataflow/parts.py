"""Part files, written as rows are made and joined into shards, from which an interrupted step resumes."""

# A part holds what one call made: some prompts, or a piece of one prompt, a range of its images. It has its SHA-256 in
# its name. A shard holds whole prompts, has a fixed name, and its SHA-256 in a file of the folder of parts, which is
# kept until the step is finished. Files that do not match their SHA-256 are not used.

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.dataflow.images import encode_pixels
from cdpo_ray.errors import GenerationError, StoreError
from cdpo_ray.store import (
    PARTS,
    delete,
    describe,
    exists,
    find_damage,
    make_folder,
    map_files,
    move,
    read_bytes,
    read_table,
    table_bytes,
    with_tensors,
    write_bytes,
    write_table,
    write_text,
)

log = logging.getLogger(__name__)
QUARANTINE = "set_aside"
"""Folder of the quarantine files of an unfinished step, and stem of the file that they are joined into."""
IMAGES_PER_BATCH = "images_per_batch"
"""Column with the number of images per forward pass, which is not written to the part."""
IMAGE_START, IMAGE_STOP = "image_start", "image_stop"
"""Columns with the range of images that a piece of a prompt holds; rows of whole prompts have none."""
MAX_ROW_BYTES = 2**31 - 2**20
"""Maximum size of a list of PNGs: Arrow counts their bytes with 31 bits."""
PER_IMAGE = ("latents", "latents_std")
"""Tensor columns whose first dimension counts the images of a prompt, as the lists of the list columns do."""


@dataclass(frozen=True, order=True, kw_only=True)
class Part:
    """File of rows that one call made, or an existing shard; sorted by prompt and image.

    Attributes:
        first: prompt index of the first row.
        image_start: index of the first image.
        num_images: number of images of a piece of a prompt; `None`: the rows are of whole prompts.
        is_shard: whether it is a finished shard, which is not joined again.
        images_per_batch: number of images per forward pass, if known.
    """

    first: int
    image_start: int = 0
    num_rows: int
    num_bytes: int
    path: Path = field(compare=False)
    num_images: int | None = field(default=None, compare=False)
    is_shard: bool = field(default=False, compare=False)
    images_per_batch: int | None = field(default=None, compare=False)


def write_part(rows: pa.Table, *, parts_dir: Path) -> pa.Table:
    """Write the rows that one call made, with pixels as PNGs.

    Equal rows give an equal file of the same name.

    Returns:
        One row that describes the file, see `_PART_SCHEMA`.
    """
    first, image_start = address_of(rows)
    row = {"first": first, "image_start": image_start, "num_rows": rows.num_rows}
    if IMAGES_PER_BATCH in rows.column_names:
        row["images_per_batch"] = min(rows[IMAGES_PER_BATCH].to_pylist())
        rows = rows.drop_columns(IMAGES_PER_BATCH)
    name = f"{first:012d}"
    if images := images_of(rows):
        row["num_images"] = len(images)
        name += f"-{image_start:06d}"
    content = table_bytes(encode_pixels(rows))
    name += f"-{hashlib.sha256(content).hexdigest()}.parquet"
    write_bytes(parts_dir / name, content)
    return pa.Table.from_pylist([row | {"name": name, "num_bytes": len(content)}], _PART_SCHEMA)


_PART_SCHEMA = pa.schema(
    [("name", pa.string())]
    + [
        (name, pa.int64())
        for name in ("first", "image_start", "num_rows", "num_bytes", "num_images", "images_per_batch")
    ]
)


def refuse_large_rows(part: Part, images_per_prompt: int) -> None:
    """Raise if all images of a prompt will be too large for one row, by the size of the part, a piece of the prompt.

    The part of an evaluation holds the images of both models, so its limit is about 1 GiB for each.

    Raises:
        GenerationError: they are too large.
    """
    if part.num_images and (num_bytes := part.num_bytes * images_per_prompt // part.num_images) > MAX_ROW_BYTES:
        raise too_many_bytes(num_bytes)


def too_many_bytes(num_bytes: int) -> GenerationError:
    return GenerationError(
        f"the images of a prompt take {num_bytes / 2**30:.1f} GiB, and a row of a table must hold less than 2 GiB;"
        " lower the number or the size of the images per prompt; with `generation.keep_images: false`, none are stored"
    )


def images_of(rows: pa.Table) -> range | None:
    """Range of images that a piece of a prompt holds; `None`: the rows are of whole prompts."""
    if IMAGE_START not in rows.column_names:
        return None
    return range(rows[IMAGE_START][0].as_py(), rows[IMAGE_STOP][0].as_py())


def address_of(rows: pa.Table) -> tuple[int, int]:
    """`Part.first` and `Part.image_start` of a call's rows."""
    images = images_of(rows)
    return rows["prompt_index"][0].as_py(), images.start if images else 0


def find_parts(output_dir: Path, stem: str, images_per_prompt: int) -> tuple[list[Part], dict[int, set[int]]]:
    """Parts and shards of an interrupted attempt, in order, and the images that they hold, by prompt index.

    Every file is verified. A file whose SHA-256 differs is deleted with a warning, so that its rows are regenerated; a
    part that a shard already contains is deleted too.
    """
    parts_dir = output_dir / PARTS
    for temporary in (*output_dir.glob("*.parquet.tmp"), *parts_dir.glob("*.tmp")):
        delete(temporary)
    shards, parts = sorted(output_dir.glob(f"{stem}-*.parquet")), sorted(parts_dir.glob("*.parquet"))
    expected = {shard: _shard_sha256(parts_dir, shard) for shard in shards} | {
        part: _part_sha256(part) for part in parts
    }
    damaged = find_damage(expected, folder=output_dir)
    if damaged:
        log.warning(
            "%s: %d of %d files of the interrupted attempt are damaged, the first %s; their rows are regenerated",
            output_dir, len(damaged), len(expected), next(iter(damaged)).name,
        )  # fmt: skip
    found: list[Part] = []
    held: dict[int, set[int]] = {}
    contents = map_files(lambda path: ([], None) if path in damaged else _contents(path), expected)
    for path, (indices, piece) in zip(expected, contents, strict=True):
        images = {*(piece or range(images_per_prompt))}
        if not indices or any(not held.get(index, set()).isdisjoint(images) for index in indices):
            delete(path)
            continue
        for index in indices:
            held.setdefault(index, set()).update(images)
        found.append(
            Part(
                first=indices[0],
                image_start=piece.start if piece else 0,
                num_rows=len(indices),
                num_bytes=path.stat().st_size,
                path=path,
                num_images=len(piece) if piece else None,
                is_shard=path.parent == output_dir,
            )
        )
    return sorted(found), held


def _contents(path: Path) -> tuple[list[int], range | None]:
    """Prompt indices of a file, and the images that it holds if it is a piece of a prompt."""
    rows = read_table(path, ["prompt_index", *([IMAGE_START, IMAGE_STOP] if _is_piece(path) else [])])
    return rows["prompt_index"].to_pylist(), images_of(rows) if rows.num_rows else None


def shards_of(parts: Iterable[Part], min_bytes: int) -> Iterator[list[Part]]:
    """Group consecutive parts to at least ``min_bytes`` (the last may be smaller); an existing shard ends a group.

    The pieces of a prompt are in one group.
    """
    group: list[Part] = []
    num_bytes = 0
    for part in parts:
        if group and (part.is_shard or (num_bytes >= min_bytes and part.first != group[-1].first)):
            yield group
            group, num_bytes = [], 0
        if not part.is_shard:
            group.append(part)
            num_bytes += part.num_bytes
    if group:
        yield group


def in_order(parts: Iterable[Part], expected: Iterable[tuple[int, int]]) -> Iterator[Part]:
    """Parts, which are finished in any order, in order: each as soon as all before it are finished.

    A part that is never finished, because its prompts are quarantined, holds back all after it until the end: they are
    on disk, and are only joined later.

    Args:
        expected: `Part.first` and `Part.image_start` of all parts, in order.
    """
    finished: dict[tuple[int, int], Part] = {}
    waiting = iter(expected)
    following = next(waiting, None)
    for part in parts:
        finished[part.first, part.image_start] = part
        while following in finished:
            yield finished.pop(following)
            following = next(waiting, None)
    yield from sorted(finished.values())


def whole_prompts(
    tables: Iterable[pa.Table], images_per_prompt: int, complete: Callable[[pa.Table], pa.Table] | None = None
) -> pa.Table | None:
    """Join tables in order, with one row per prompt: its pieces are joined, a prompt with missing pieces is left out.

    Args:
        complete: computes columns that need all images of a prompt, for rows that were pieces.

    Returns:
        `None`: there is no whole prompt.
    """
    whole: list[pa.Table] = []
    by_prompt = itertools.groupby(tables, lambda rows: (rows["prompt_index"][0].as_py(), images_of(rows) is not None))
    for (_, are_pieces), group in by_prompt:
        pieces = list(group)
        if not are_pieces:
            whole += pieces
        elif sum(len(images_of(piece) or ()) for piece in pieces) == images_per_prompt:
            row = _joined(pieces)
            whole.append(complete(row) if complete else row)
    return pa.concat_tables(whole) if whole else None


def _joined(pieces: list[pa.Table]) -> pa.Table:
    """Row of the prompt whose pieces these are."""
    row = pieces[0].drop_columns([IMAGE_START, IMAGE_STOP])
    for index, column in enumerate(row.schema):
        if pa.types.is_list(column.type):
            values = [chunk for piece in pieces for chunk in pc.list_flatten(piece[column.name]).chunks]
            if (num_bytes := sum(chunk.nbytes for chunk in values)) > MAX_ROW_BYTES:
                raise too_many_bytes(num_bytes)
            items = pa.concat_arrays(values)
            whole = pa.ListArray.from_arrays(pa.array([0, len(items)], pa.int32()), items, type=column.type)
        elif column.name in PER_IMAGE:
            arrays = [piece[column.name].combine_chunks().to_numpy_ndarray() for piece in pieces]
            whole = tensor_column(np.concatenate(arrays, axis=1))
        else:
            continue
        row = row.set_column(index, pa.field(column.name, whole.type, metadata=column.metadata), whole)
    return row


def join_parts(
    parts: list[Path],
    shard: Path,
    images_per_prompt: int,
    complete: Callable[[pa.Table], pa.Table] | None = None,
) -> None:
    """Join parts, in order, into one shard; idempotent, and safe to repeat after an interruption at any point.

    Args:
        complete: see `whole_prompts`.

    Raises:
        StoreError: a part was altered after it was written.
    """
    sha256_path = _sha256_path(parts[0].parent, shard)
    if not (exists(shard) and exists(sha256_path)):
        if len(parts) == 1 and not _is_piece(parts[0]):
            read_part(parts[0])
            write_text(sha256_path, _part_sha256(parts[0]))  # written first: a shard without it is not used
            move(parts[0], shard)
        elif rows := whole_prompts(map(read_part, parts), images_per_prompt, complete):
            write_table(rows, shard)
            write_text(sha256_path, describe(shard)["sha256"])
    for part in parts:
        delete(part)


def read_part(part: Path) -> pa.Table:
    """Read the rows of a part.

    Raises:
        StoreError: the part was altered after it was written.
    """
    content = read_bytes(part)
    if hashlib.sha256(content).hexdigest() != _part_sha256(part):
        raise StoreError(f"{part}: was altered (its SHA-256 differs); run the same command again to regenerate it")
    return with_tensors(pq.read_table(pa.BufferReader(content)))


def _part_sha256(part: Path) -> str:
    """SHA-256 in the name of a part; empty if there is none."""
    return part.stem.rpartition("-")[2] if "-" in part.stem else ""


def _is_piece(part: Path) -> bool:
    """Whether a file holds a piece of a prompt, by its name: other parts and shards have one hyphen."""
    return part.stem.count("-") == 2


def _sha256_path(parts_dir: Path, shard: Path) -> Path:
    return parts_dir / f"{shard.name}.sha256"


def _shard_sha256(parts_dir: Path, shard: Path) -> str:
    """Recorded SHA-256 of a shard; empty if the shard was not finished."""
    path = _sha256_path(parts_dir, shard)
    return path.read_text(encoding="utf-8", errors="replace") if exists(path) else ""


def write_quarantined(
    output_dir: Path, prompt_index: int, entry: Mapping[str, Any], images: range | None = None
) -> None:
    """Write the quarantine file of one prompt, or of a range of its images; its name holds the SHA-256."""
    line = f"{json.dumps(entry)}\n"
    what = f"{prompt_index:012d}" + (f"-{images.start:06d}" if images else "")
    path = output_dir / QUARANTINE / f"{what}-{hashlib.sha256(line.encode()).hexdigest()}.jsonl"
    make_folder(path.parent)
    write_text(path, line)


def read_quarantined(output_dir: Path) -> list[dict[str, Any]]:
    """Entries of the prompts and images that are quarantined so far, each with its `reason`.

    Damaged entries are skipped with a warning, and their prompts are retried.
    """
    paths = sorted((output_dir / QUARANTINE).glob("*.jsonl"))
    for path in find_damage({path: _part_sha256(path) for path in paths if "-" in path.stem}, folder=output_dir):
        log.warning("%s: was altered (its SHA-256 differs); its prompt is retried", path)
        delete(path)
        paths.remove(path)
    last = {path.stem.removesuffix(f"-{_part_sha256(path)}"): path for path in paths}  # a retried prompt has several
    joined = output_dir / f"{QUARANTINE}.jsonl"
    entries: dict[str, Any] = {}
    for path in [joined, *last.values()] if exists(joined) else last.values():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entries[line] = json.loads(line)
            if not isinstance(entries.get(line), dict):
                entries.pop(line, None)
                log.warning("%s: holds a line that is not a JSON object; its prompt is retried", path)
    return [*entries.values()]


def join_quarantined(output_dir: Path) -> list[dict[str, Any]]:
    """Join the quarantine files into `set_aside.jsonl`, if there are any; returns the entries."""
    found = read_quarantined(output_dir)
    if found:
        write_text(output_dir / f"{QUARANTINE}.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in found))
    delete(output_dir / QUARANTINE)
    return found

"""Part files, written as rows are made and joined into shards, from which an interrupted step resumes."""

# A part has its SHA-256 in its name. A shard has a fixed name, and its SHA-256 in a file of the folder of parts, which
# is kept until the step is finished. Files that do not match their SHA-256 are not used.

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.dataflow.images import encode_pixels
from cdpo_ray.errors import StoreError
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


@dataclass(frozen=True, order=True)
class Part:
    """File of rows that one call made, or an existing shard; sorted by prompt.

    Attributes:
        first: prompt index of the first row.
        is_shard: whether it is a finished shard, which is not joined again.
        images_per_batch: number of images per forward pass, if known.
    """

    first: int
    num_rows: int
    num_bytes: int
    path: Path = field(compare=False)
    is_shard: bool = False
    images_per_batch: int | None = None


def write_part(rows: pa.Table, *, parts_dir: Path) -> pa.Table:
    """Write the rows that one call made, with pixels as PNGs.

    Equal rows give an equal file of the same name.

    Returns:
        One row that describes the file, see `_PART_SCHEMA`.
    """
    first, images_per_batch = rows["prompt_index"][0], None
    if IMAGES_PER_BATCH in rows.column_names:
        images_per_batch = min(rows[IMAGES_PER_BATCH].to_pylist())
        rows = rows.drop_columns(IMAGES_PER_BATCH)
    content = table_bytes(encode_pixels(rows))
    name = f"{first.as_py():012d}-{hashlib.sha256(content).hexdigest()}.parquet"
    write_bytes(parts_dir / name, content)
    row = {"name": name, "first": first, "num_rows": rows.num_rows, "num_bytes": len(content)}
    return pa.Table.from_pylist([row | {"images_per_batch": images_per_batch}], _PART_SCHEMA)


_PART_SCHEMA = pa.schema(
    [("name", pa.string())] + [(name, pa.int64()) for name in ("first", "num_rows", "num_bytes", "images_per_batch")]
)


def find_parts(output_dir: Path, stem: str) -> tuple[list[Part], set[int]]:
    """Parts and shards of an interrupted attempt, in order, and the prompt indices that they hold.

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
    found, held = [], set[int]()
    rows = map_files(lambda path: [] if path in damaged else _prompt_indices(path), expected)
    for path, indices in zip(expected, rows, strict=True):
        if not indices or not held.isdisjoint(indices):
            delete(path)
            continue
        held |= set(indices)
        is_shard = path.parent == output_dir
        found.append(Part(indices[0], len(indices), path.stat().st_size, path, is_shard))
    return sorted(found), held


def _prompt_indices(path: Path) -> list[int]:
    indices: list[int] = read_table(path, ["prompt_index"])["prompt_index"].to_pylist()
    return indices


def shards_of(parts: Iterable[Part], min_bytes: int) -> Iterator[list[Part]]:
    """Group consecutive parts to at least ``min_bytes`` (the last may be smaller); an existing shard ends a group."""
    group: list[Part] = []
    for part in parts:
        if not part.is_shard:
            group.append(part)
        if group and (part.is_shard or sum(part.num_bytes for part in group) >= min_bytes):
            yield group
            group = []
    if group:
        yield group


def join_parts(parts: list[Path], shard: Path) -> None:
    """Join parts, in order, into one shard; idempotent, and safe to repeat after an interruption at any point.

    Raises:
        StoreError: a part was altered after it was written.
    """
    sha256_path = _sha256_path(parts[0].parent, shard)
    if not (exists(shard) and exists(sha256_path)):
        if len(parts) == 1:
            read_part(parts[0])
            write_text(sha256_path, _part_sha256(parts[0]))  # written first: a shard without it is not used
            move(parts[0], shard)
        else:
            write_table(pa.concat_tables(map(read_part, parts)), shard)
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
    return part.stem.partition("-")[2]


def _sha256_path(parts_dir: Path, shard: Path) -> Path:
    return parts_dir / f"{shard.name}.sha256"


def _shard_sha256(parts_dir: Path, shard: Path) -> str:
    """Recorded SHA-256 of a shard; empty if the shard was not finished."""
    path = _sha256_path(parts_dir, shard)
    return path.read_text(encoding="utf-8", errors="replace") if exists(path) else ""


def write_quarantined(output_dir: Path, prompt_index: int, entry: Mapping[str, Any]) -> None:
    """Write the quarantine file of one prompt; its name holds the SHA-256."""
    line = f"{json.dumps(entry)}\n"
    path = output_dir / QUARANTINE / f"{prompt_index:012d}-{hashlib.sha256(line.encode()).hexdigest()}.jsonl"
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
    last = {path.stem.partition("-")[0]: path for path in paths}  # a prompt that was retried has several
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

"""Rows as they are made -> part files, durable at once, joined into shards; what an interrupted step left counts."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdpo_ray.generation.images import encode_pixels
from cdpo_ray.store import delete, exists, move, read_table, write_table, write_text

PARTS, SET_ASIDE = "parts", "set_aside"
IMAGES_PER_BATCH = "images_per_batch"
"""Column that tells a part of how many images went through the net at once; it is not kept."""


@dataclass(frozen=True, order=True)
class Part:
    """A file of rows that were made together, or a shard that is there; in the order of prompts.

    Attributes:
        first: prompt index of its first row.
        is_shard: it has been joined, and is not joined again.
    """

    first: int
    num_rows: int
    num_bytes: int
    path: Path = field(compare=False)
    is_shard: bool = False
    images_per_batch: int | None = None


def write_part(rows: pa.Table, *, parts_dir: Path) -> pa.Table:
    """Write rows that one call made, pixels as PNGs; returns one row about the file. Equal rows give an equal file."""
    first, images_per_batch = rows["prompt_index"][0], None
    if IMAGES_PER_BATCH in rows.column_names:
        images_per_batch = min(rows[IMAGES_PER_BATCH].to_pylist())
        rows = rows.drop_columns(IMAGES_PER_BATCH)
    path = parts_dir / f"{first.as_py():012d}.parquet"
    write_table(encode_pixels(rows), path)
    told = {"first": first, "num_rows": rows.num_rows, "num_bytes": path.stat().st_size}
    return pa.Table.from_pylist([told | {"images_per_batch": images_per_batch}], _TOLD)


_TOLD = pa.schema([(name, pa.int64()) for name in ("first", "num_rows", "num_bytes", "images_per_batch")])


def find_parts(output_dir: Path, stem: str) -> tuple[list[Part], set[int]]:
    """What an interrupted attempt left, in order, and the prompt indices that it holds.

    A file that was cut off, and a part that a shard holds too, are deleted.
    """
    parts_dir = output_dir / PARTS
    for aside in (*output_dir.glob("*.parquet.tmp"), *parts_dir.glob("*.tmp")):
        delete(aside)
    found, held = [], set[int]()
    for path in (*sorted(output_dir.glob(f"{stem}-*.parquet")), *sorted(parts_dir.glob("*.parquet"))):
        try:
            indices = read_table(path, ["prompt_index"])["prompt_index"].to_pylist()
        except pa.ArrowInvalid:
            indices = []
        if not indices or not held.isdisjoint(indices):
            delete(path)
            continue
        held |= set(indices)
        is_shard = path.parent == output_dir
        found.append(Part(indices[0], len(indices), path.stat().st_size, path, is_shard))
    return sorted(found), held


def shards_of(parts: Iterable[Part], min_bytes: int) -> Iterator[list[Part]]:
    """Neighbours that together have ``min_bytes`` (the last of all may have less); a shard there ends a group."""
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
    """Parts -> one shard, in their order. Done twice, or broken off between any two files, it ends the same."""
    if not exists(shard):
        if len(parts) == 1:
            move(parts[0], shard)
        else:
            write_table(pa.concat_tables(map(read_table, parts)), shard)
    for part in parts:
        delete(part)


def read_set_aside(output_dir: Path) -> list[dict[str, Any]]:
    """What was set aside up to now, an entry each, with its `reason`."""
    paths = [output_dir / f"{SET_ASIDE}.jsonl", *sorted((output_dir / SET_ASIDE).glob("*.jsonl"))]
    lines = dict.fromkeys(line for path in paths if exists(path) for line in path.read_text().splitlines())
    return [json.loads(line) for line in lines]


def join_set_aside(output_dir: Path) -> list[dict[str, Any]]:
    """Files of what was set aside -> `set_aside.jsonl`, if there is anything; returns its entries."""
    found = read_set_aside(output_dir)
    if found:
        write_text(output_dir / f"{SET_ASIDE}.jsonl", "".join(f"{json.dumps(entry)}\n" for entry in found))
    delete(output_dir / SET_ASIDE)
    return found

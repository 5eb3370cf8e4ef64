"""Parquet files, wherever they lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.store.places import is_local


def arrow_place(path: Path) -> dict[str, Any]:
    """A path as pyarrow and Ray Data take it: `{"path": text, "filesystem": ...}`."""
    if is_local(path):
        return {"path": str(path), "filesystem": None}
    return {"path": path.path, "filesystem": path.fs}  # type: ignore[attr-defined]


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file."""
    where = arrow_place(path)
    pq.write_table(table, where["path"], filesystem=where["filesystem"])


def read_table(path: Path, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
    """Columns of a Parquet file, all by default; raises what pyarrow raises."""
    where = arrow_place(path)
    return pq.read_table(where["path"], columns=columns, filters=filters, filesystem=where["filesystem"])


def read_shards(folder: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of all Parquet shards of a folder, in the order of their names."""
    return pa.concat_tables(read_table(path, columns=list(columns)) for path in sorted(folder.glob("*.parquet")))


def shard_schema(folder: Path) -> pa.Schema:
    """Columns of a folder's Parquet shards."""
    with min(folder.glob("*.parquet")).open("rb") as handle:
        return pq.read_schema(handle)

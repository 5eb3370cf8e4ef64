"""Parquet files, wherever they lie."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.errors import StoreError, printable
from cdpo_ray.store.places import is_local, new_file

COPIED_BYTES = 2**22
EXTENSION = b"ARROW:extension:name"
"""Key of a field's metadata where its extension type is not registered in this process."""


def arrow_place(path: Path) -> dict[str, Any]:
    """A path as pyarrow and Ray Data take it: `{"path": text, "filesystem": ...}`."""
    if is_local(path):
        return {"path": str(path), "filesystem": None}
    return {"path": path.path, "filesystem": path.fs}  # type: ignore[attr-defined]


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file whole or not at all."""
    write_tables([table], path)


def write_tables(tables: Iterable[pa.Table], path: Path) -> None:
    """Write a Parquet file whole or not at all, table by table: at least one, all of one schema.

    One table is held at a time; each starts a row group.
    """
    if is_local(path):
        aside = path.with_name(f"{path.name}.tmp")
        with new_file(aside) as handle:
            _write_tables(tables, handle)
            handle.flush()
            os.fsync(handle.fileno())
        aside.replace(path)
        return
    with tempfile.TemporaryFile() as handle:  # were a table not to come, the object would be there, truncated
        _write_tables(tables, handle)
        handle.seek(0)
        with path.open("wb") as writable:
            shutil.copyfileobj(handle, writable, COPIED_BYTES)


def _write_tables(tables: Iterable[pa.Table], handle: Any) -> None:
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(handle, first.schema) as writer:
        writer.write_table(first)
        del first
        for table in tables:
            writer.write_table(table)
            del table  # before the next is made


def read_table(path: Path, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
    """Columns of a Parquet file, all by default; raises as `table_schema`, and what pyarrow raises."""
    where = arrow_place(path)
    table = pq.read_table(where["path"], columns=columns, filters=filters, filesystem=where["filesystem"])
    _refuse_objects(table.schema, path)
    return table


def read_shards(folder: Path, columns: Sequence[str]) -> pa.Table:
    """Columns of all Parquet shards of a folder, in the order of their names."""
    return pa.concat_tables(read_table(path, columns=list(columns)) for path in sorted(folder.glob("*.parquet")))


def shard_schema(folder: Path) -> pa.Schema:
    """Columns of a folder's Parquet shards."""
    return table_schema(min(folder.glob("*.parquet")))


def count_rows(folder: Path) -> int:
    """Rows of a folder's Parquet shards; reads none of them."""
    return sum(map(rows_of, folder.glob("*.parquet")))


def rows_of(path: Path) -> int:
    """Rows of a Parquet file; reads none of them."""
    with path.open("rb") as handle:
        return int(pq.read_metadata(handle).num_rows)


def table_schema(path: Path) -> pa.Schema:
    """Columns of a Parquet file; reads no rows.

    Raises:
        StoreError: a column is of an extension type other than fixed-shape tensors.
    """
    with path.open("rb") as handle:
        schema = pq.read_schema(handle)
    _refuse_objects(schema, path)
    return schema


def _refuse_objects(schema: pa.Schema, path: Path) -> None:
    """Refuse columns of pickled objects, an extension type of Ray Data: reading one of their values runs its code."""
    if objects := [field.name for field in schema if _may_hold_objects(field)]:
        raise StoreError(
            f"{path}: column {printable(repr(objects[0]))} may hold pickled objects, which are not read; the file was"
            " altered, do not use it"
        )


def _may_hold_objects(field: pa.Field) -> bool:
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        return not isinstance(kind, pa.FixedShapeTensorType)
    if EXTENSION in (field.metadata or {}):  # of a type that only other processes know
        return True
    inner = [kind.field(index) for index in range(kind.num_fields)]
    return any(map(_may_hold_objects, [pa.field("", kind.value_type)] if pa.types.is_dictionary(kind) else inner))

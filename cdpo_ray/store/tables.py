"""Parquet files, wherever they lie."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.errors import StoreError, printable
from cdpo_ray.store.failures import storage_errors
from cdpo_ray.store.paths import is_local, new_file

EXTENSION = b"ARROW:extension:name"
"""Key of a field's metadata where its extension type is not registered in this process."""


def arrow_path(path: Path) -> dict[str, Any]:
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

    Raises:
        StoreError: the disk or the store fails.
    """
    with new_file(path) as handle:
        _write_tables(tables, handle)


def _write_tables(tables: Iterable[pa.Table], handle: BinaryIO) -> None:
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(handle, first.schema) as writer:
        writer.write_table(first)
        del first
        for table in tables:
            writer.write_table(table)
            del table  # before the next is made


def table_bytes(table: pa.Table) -> bytes:
    """Content of the Parquet file that `write_table` writes; equal tables give equal bytes."""
    buffer = pa.BufferOutputStream()
    _write_tables([table], buffer)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def read_table(path: Path, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
    """Columns of a Parquet file, all by default.

    Raises:
        ArrowInvalid: it is no whole Parquet file.
        FileNotFoundError: there is no such file.
        StoreError: as of `table_schema`.
    """
    where = arrow_path(path)
    with storage_errors(path, "read"):
        try:
            table = pq.read_table(where["path"], columns=columns, filters=filters, filesystem=where["filesystem"])
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # Arrow's own, of what it cannot decode
                raise pa.ArrowInvalid(str(error)) from None
            raise
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
    return sum(map(num_rows_of, folder.glob("*.parquet")))


def num_rows_of(path: Path) -> int:
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

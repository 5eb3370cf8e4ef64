"""Parquet files on local disk and in object stores.

A tensor per row is stored as a fixed-size list, with the shape in the field's metadata: many programs cannot read
Arrow's tensor type, which the functions here accept and return.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.errors import StoreError, printable
from cdpo_ray.store.failures import storage_errors
from cdpo_ray.store.paths import is_local, new_file

EXTENSION = b"ARROW:extension:name"
"""Metadata key of a field whose extension type is not registered in this process."""

SHAPE = b"shape"
"""Metadata key of a stored tensor's field: the shape of a row, as JSON."""

GROUP_BYTES = 4 * 2**20
"""Size of the tensors of a row group, which holds one row at least: whoever needs a few rows reads little more."""
TENSOR_OPTIONS = {"use_dictionary": False, "compression": "zstd"}
"""Options of a file with tensors: dictionaries of their values save nothing, and take most of the time."""


def arrow_path(path: Path) -> dict[str, Any]:
    """Path as pyarrow and Ray Data accept it: `{"path": text, "filesystem": ...}`."""
    if is_local(path):
        return {"path": str(path), "filesystem": None}
    return {"path": path.path, "filesystem": path.fs}  # type: ignore[attr-defined]


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file atomically; raises StoreError."""
    write_tables([table], path)


def write_tables(tables: Iterable[pa.Table], path: Path) -> None:
    """Write at least one table of one schema to a Parquet file, atomically.

    One table is held in memory at a time; each starts a row group, and tensors several of `GROUP_BYTES`.

    Raises:
        StoreError: the storage fails.
    """
    with new_file(path) as handle:
        _write_tables(tables, handle)


def _write_tables(tables: Iterable[pa.Table], handle: BinaryIO) -> None:
    tables = map(_with_lists, tables)
    first = next(tables)
    tensors = [field.type for field in first.schema if SHAPE in (field.metadata or {})]
    row_bytes = sum(kind.list_size * kind.value_type.byte_width for kind in tensors)
    num_rows = max(1, GROUP_BYTES // row_bytes) if row_bytes else None
    with pq.ParquetWriter(handle, first.schema, **(TENSOR_OPTIONS if tensors else {})) as writer:
        writer.write_table(first, num_rows)
        del first
        for table in tables:
            writer.write_table(table, num_rows)
            del table  # freed before the next is made


def _with_lists(table: pa.Table) -> pa.Table:
    """Tensor columns as fixed-size lists; shares the memory."""
    for index, field in enumerate(table.schema):
        if isinstance(field.type, pa.FixedShapeTensorType):
            listed = pa.field(field.name, field.type.storage_type, metadata={SHAPE: json.dumps(field.type.shape)})
            column = pa.chunked_array([chunk.storage for chunk in table.column(index).chunks], listed.type)
            table = table.set_column(index, listed, column)
    return table


def with_tensors(table: pa.Table) -> pa.Table:
    """Stored tensor columns as Arrow's tensor type; shares the memory.

    Raises:
        ArrowInvalid: a shape does not fit the number of values of a row.
    """
    for index, (stored, field) in enumerate(zip(table.schema, schema_with_tensors(table.schema), strict=True)):
        if field.type != stored.type:
            chunks = [pa.ExtensionArray.from_storage(field.type, chunk) for chunk in table.column(index).chunks]
            table = table.set_column(index, field, pa.chunked_array(chunks, field.type))
    return table


def schema_with_tensors(schema: pa.Schema) -> pa.Schema:
    """Schema of `with_tensors`.

    Raises:
        ArrowInvalid: a shape does not fit the number of values of a row.
    """
    for index, field in enumerate(schema):
        if pa.types.is_fixed_size_list(field.type) and SHAPE in (field.metadata or {}):
            tensor = pa.field(field.name, pa.fixed_shape_tensor(field.type.value_type, _shape_of(field)))
            schema = schema.set(index, tensor)
    return schema


def _shape_of(field: pa.Field) -> list[int]:
    try:
        shape = json.loads(field.metadata[SHAPE])
    except (ValueError, RecursionError):
        shape = None
    is_shape = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not is_shape or math.prod(shape) != field.type.list_size:
        raise pa.ArrowInvalid(
            f"column {field.name}: `shape` must be that of {field.type.list_size} values, got"
            f" {printable(field.metadata[SHAPE])}"
        )
    return list(shape)


def table_bytes(table: pa.Table) -> bytes:
    """Content of the Parquet file that `write_table` would write; equal tables give equal bytes."""
    buffer = pa.BufferOutputStream()
    _write_tables([table], buffer)
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def read_table(path: Path, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
    """Read columns of a Parquet file.

    Args:
        columns: names; ``None``: all.
        filters: row filter, see `pyarrow.parquet.read_table`.

    Raises:
        ArrowInvalid: the file is not Parquet, or is truncated.
        FileNotFoundError: there is no such file.
        StoreError: as `table_schema`, or the storage fails.
    """
    where = arrow_path(path)
    with storage_errors(path, "read"):
        try:
            table = pq.read_table(where["path"], columns=columns, filters=filters, filesystem=where["filesystem"])
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # raised by Arrow for data that it cannot decode
                raise pa.ArrowInvalid(str(error)) from None
            raise
    _refuse_objects(table.schema, path)
    return with_tensors(table)


def read_shards(folder: Path, columns: Sequence[str]) -> pa.Table:
    """Read columns of all Parquet shards of a folder, in the order of their names."""
    return pa.concat_tables(read_table(path, columns=list(columns)) for path in sorted(folder.glob("*.parquet")))


def shard_schema(folder: Path) -> pa.Schema:
    """Schema of a folder's Parquet shards."""
    return table_schema(min(folder.glob("*.parquet")))


def count_rows(folder: Path) -> int:
    """Number of rows of a folder's Parquet shards; reads only their metadata."""
    return sum(map(num_rows_of, folder.glob("*.parquet")))


def num_rows_of(path: Path) -> int:
    """Number of rows of a Parquet file; reads only its metadata."""
    with path.open("rb") as handle:
        return int(pq.read_metadata(handle).num_rows)


def table_metadata(path: Path) -> tuple[pq.FileMetaData, pa.Schema]:
    """Metadata of a Parquet file, with its row groups, and its schema; raises as `table_schema`."""
    with storage_errors(path, "read"), _open_ranges(path) as handle:
        file = pq.ParquetFile(handle)
        metadata, schema = file.metadata, file.schema_arrow
    _refuse_objects(schema, path)
    return metadata, schema_with_tensors(schema)


def read_row_group(path: Path, group: int, columns: Sequence[str], metadata: pq.FileMetaData) -> pa.Table:
    """Read columns of one row group, and no other bytes of the file; raises as `read_table`.

    Args:
        metadata: see `table_metadata`.
    """
    with storage_errors(path, "read"), _open_ranges(path) as handle:
        file = pq.ParquetFile(handle, metadata=metadata, pre_buffer=not is_local(path))
        return with_tensors(file.read_row_group(group, columns=list(columns), use_threads=False))


def _open_ranges(path: Path) -> Any:
    """Open a file of which ranges are read; clients of object stores would read megabytes ahead."""
    return path.open("rb") if is_local(path) else path.fs.open(path.path, "rb", cache_type="none")  # type: ignore[attr-defined]


def table_schema(path: Path) -> pa.Schema:
    """Schema of a Parquet file; reads no rows.

    Raises:
        ArrowInvalid: a tensor column has an invalid shape.
        StoreError: a column has an extension type other than fixed-shape tensors.
    """
    with path.open("rb") as handle:
        schema = pq.read_schema(handle)
    _refuse_objects(schema, path)
    return schema_with_tensors(schema)


def _refuse_objects(schema: pa.Schema, path: Path) -> None:
    """Refuse columns of pickled objects, an extension type of Ray Data: reading such a value runs its code."""
    if objects := [field.name for field in schema if _may_hold_objects(field)]:
        raise StoreError(
            f"{path}: column {printable(repr(objects[0]))} may hold pickled objects, which are not read; the file was"
            " altered, do not use it"
        )


def _may_hold_objects(field: pa.Field) -> bool:
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        return not isinstance(kind, pa.FixedShapeTensorType)
    if EXTENSION in (field.metadata or {}):  # a type that is not registered in this process
        return True
    inner = [kind.field(index) for index in range(kind.num_fields)]
    return any(map(_may_hold_objects, [pa.field("", kind.value_type)] if pa.types.is_dictionary(kind) else inner))

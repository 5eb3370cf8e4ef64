"""Readers of Parquet and Arrow files."""

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.formats import with_small_row_groups
from cdpo_ray.preferences.reader import Chunk, Reader, refusing_damage
from cdpo_ray.preferences.rows import Numbered, PreferenceSource
from cdpo_ray.preferences.text_readers import not_utf8

ROWS_PER_BATCH = 16  # of Parquet rows with images
PAGE_BYTES = 2**20
"""Buffer per Parquet column, instead of the column's whole chunk of a row group."""
MAX_ROW_GROUP_BYTES = 10**9


class Parquet(Reader):
    """A chunk is a row group, of which a few rows at a time are in memory."""

    skips_images = True

    def columns(self, path: Path, source: PreferenceSource) -> Collection[str]:
        return _columns(path, _open_parquet(path).schema_arrow, source)

    def seeks(self, path: Path) -> bool:
        return True

    def chunks(self, path: Path, source: PreferenceSource) -> Iterator[Chunk]:
        metadata, number = _open_parquet(path).metadata, 1
        for group in range(metadata.num_row_groups):
            num_rows = metadata.row_group(group).num_rows
            yield Chunk(str(path), group, num_rows, number, 0)
            number += num_rows

    def records(self, chunk: Chunk, source: PreferenceSource, *, images: bool) -> Iterator[Numbered]:
        path = Path(chunk.path)
        with refusing_damage(path):
            file = _open_parquet(path)
            columns = source.wanted(_columns(path, file.schema_arrow, source), images=images)
            batch_size = {"batch_size": ROWS_PER_BATCH} if images else {}
            batches = file.iter_batches(**batch_size, row_groups=[chunk.start], columns=columns)
            yield from _numbered(batches, chunk.first_number)

    def may_lack_images(self, chunk: Chunk, source: PreferenceSource) -> bool:
        """Whether a row group names image files, or has null images by its statistics; their bytes are not read."""
        file = _open_parquet(Path(chunk.path))
        leaves = _image_leaves(file, source)
        data = {leaf for leaf, is_text in leaves.items() if not is_text}
        if not data or any(is_text and not leaf.endswith(".path") for leaf, is_text in leaves.items()):
            return True
        group = file.metadata.row_group(chunk.start)
        stored = [group.column(number) for number in range(group.num_columns)]
        counted = [leaf.statistics for leaf in stored if leaf.path_in_schema in data and leaf.is_stats_set]
        return any(statistics.null_count for statistics in counted)

    def image_paths(self, chunk: Chunk, source: PreferenceSource) -> Iterator[Any]:
        path = Path(chunk.path)
        with refusing_damage(path):
            file = _open_parquet(path)
            _columns(path, file.schema_arrow, source)
            names = [leaf for leaf, is_text in _image_leaves(file, source).items() if is_text]
            batches = file.iter_batches(row_groups=[chunk.start], columns=names) if names else []
            yield from (values for _, values in _numbered(batches, chunk.first_number))

    def warnings(self, path: Path, source: PreferenceSource) -> Iterator[str]:
        metadata = _open_parquet(path).metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        largest = max(groups, key=lambda group: group.total_byte_size, default=None)
        if largest and largest.total_byte_size > MAX_ROW_GROUP_BYTES:
            yield (
                f"{path}: has a row group of {largest.num_rows:,} rows and {largest.total_byte_size / 1e9:.1f} GB,"
                " which a single task reads slowly and with much memory; write smaller ones:"
                f" {with_small_row_groups(path)}"
            )


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=PAGE_BYTES, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise PreferenceError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _image_leaves(file: pq.ParquetFile, source: PreferenceSource) -> dict[str, bool]:
    """Leaf columns of the images, and whether they hold text."""
    leaves = [file.schema.column(number) for number in range(len(file.schema))]
    names = source.image_names
    return {leaf.path: leaf.logical_type.type == "STRING" for leaf in leaves if leaf.path.split(".")[0] in names}


class Arrow(Reader):
    """Arrow's stream or file format, which `datasets` writes; a chunk is a record batch, mapped into memory."""

    skips_images = True

    def columns(self, path: Path, source: PreferenceSource) -> Collection[str]:
        with refusing_damage(path):
            return _columns(path, _open_arrow(path)[0], source)

    def seeks(self, path: Path) -> bool:
        return True

    def chunks(self, path: Path, source: PreferenceSource) -> Iterator[Chunk]:
        number = 1
        with refusing_damage(path):
            for index, batch in enumerate(_open_arrow(path)[1]):
                yield Chunk(str(path), index, batch.num_rows, number, 0)
                number += batch.num_rows

    def records(self, chunk: Chunk, source: PreferenceSource, *, images: bool) -> Iterator[Numbered]:
        with refusing_damage(Path(chunk.path)):
            yield from _numbered([self._batch(chunk, source, images=images)], chunk.first_number)

    def may_lack_images(self, chunk: Chunk, source: PreferenceSource) -> bool:
        with refusing_damage(Path(chunk.path)):
            batch = self._batch(chunk, source, images=True)
        return any(_may_be_null_or_text(batch[name]) for name in source.image_names & {*batch.schema.names})

    def _batch(self, chunk: Chunk, source: PreferenceSource, *, images: bool) -> pa.RecordBatch:
        path = Path(chunk.path)
        schema, batches = _open_arrow(path)
        columns = source.wanted(_columns(path, schema, source), images=images)
        batch = next(islice(batches, chunk.start, None)).select(columns)
        batch.validate(full=True)  # offsets of a damaged file may lie outside its buffers
        return batch


def _open_arrow(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    file = pa.memory_map(str(path))
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    file.seek(0)
    stream = pa.ipc.open_stream(file)
    return stream.schema, iter(stream)


def _may_be_null_or_text(column: pa.Array) -> bool:
    """Whether a column of images has nulls, or may name files; their bytes are not read."""
    kind = column.type
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return bool(column.null_count) or index < 0 or _may_be_null_or_text(column.field(index))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return bool(column.null_count) or _may_be_null_or_text(column.values)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return not is_bytes or bool(column.null_count)


def _numbered(batches: Any, number: int) -> Iterator[Numbered]:
    for batch in batches:
        for row in range(batch.num_rows):
            yield number, _record(batch, row)
            number += 1


def _record(batch: pa.RecordBatch, row: int) -> Any:
    try:
        return {name: column[row].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    except UnicodeDecodeError as error:
        return not_utf8(error)


def _columns(path: Path, schema: pa.Schema, source: PreferenceSource) -> list[str]:
    """Columns of a file.

    Raises:
        PreferenceError: a column to read is of an extension type, which may unpickle what it reads.
    """
    for name in {*source.wanted(schema.names)} & {*schema.names}:
        column = schema.field(name)
        if _holds_objects(column):
            raise PreferenceError(
                f"{path}: column {name!r} holds objects of {column.type}, which may run code and were not read; write"
                " plain strings, numbers or bytes"
            )
    return list(schema.names)


def _holds_objects(field: pa.Field) -> bool:
    if isinstance(field.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        return True
    return any(_holds_objects(field.type.field(index)) for index in range(field.type.num_fields))

"""Parquet file -> the prompts of one column and their categories; other columns are not read."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.errors import PromptError
from cdpo_ray.prompts.faults import not_text
from cdpo_ray.prompts.rows import Columns, Row

ROWS_AT_ONCE = 10_000


def read_parquet(handle: BinaryIO, columns: Columns) -> Iterator[tuple[str, Row | PromptError]]:
    """Place and row, or place and fault, of each row.

    Only columns of text, and of whole numbers for categories, are read: of columns of pickled objects or other
    extension types, only the type is inspected.

    Raises:
        PromptError: the file is not Parquet, or a column is missing or does not hold text.
    """
    try:
        file = pq.ParquetFile(handle)
        column, category = _text_columns(file.schema_arrow, columns)
        row = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=sorted({column, category or column})):
            labels = _texts(batch[category]) if category else [None] * batch.num_rows
            for prompt, label in zip(_texts(batch[column]), labels, strict=True):
                row += 1
                yield f"row {row}", not_text(column, None) if prompt is None else columns.row(prompt, label, category)
    except PromptError:
        raise
    except Exception as error:  # raised by pyarrow, or by an extension type that another library registered
        reason = str(error).strip().split("\n")[0]
        raise PromptError(f"cannot be read as Parquet: {reason}") from None


def _text_columns(schema: pa.Schema, columns: Columns) -> tuple[str, str | None]:
    column, category = columns.within(schema.names)
    kind = schema.field(column).type
    if not _is_text(kind):
        raise PromptError(f"`{column}` must be one column of text, got {kind}; set `column` to another")
    kind = schema.field(category).type if category else None
    if category and not _is_text(kind) and not pa.types.is_integer(kind):
        if columns.category is None:
            return column, None
        raise PromptError(
            f"`{category}` must be a column of text or whole numbers, got {kind}; set `category_column` to another"
        )
    return column, category


def _texts(column: pa.Array) -> list[Any]:
    """Values of a column: text, with bytes that are not UTF-8 kept for `undecoded` to find, or whole numbers."""
    if not _is_text(column.type):
        return column.to_pylist()
    # As bytes: pyarrow would stop at the first value that is not UTF-8, without naming the row.
    found = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in found]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

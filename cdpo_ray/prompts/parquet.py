"""Parquet file -> the prompts of one column; other columns are not read."""

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.errors import PromptError
from cdpo_ray.prompts.faults import column_of, not_text

ROWS_AT_ONCE = 10_000


def read_parquet(handle: BinaryIO, column: str) -> Iterator[tuple[str, str | PromptError]]:
    """Place and prompt, or place and fault, of each row.

    Only text columns are read: of columns of pickled objects or other extension types, only the type is inspected.

    Raises:
        PromptError: the file is not Parquet, or the column is missing or does not hold text.
    """
    try:
        file = pq.ParquetFile(handle)
        column = _text_column(file.schema_arrow, column)
        row = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
            # As bytes: pyarrow would stop at the first value that is not UTF-8, without naming the row.
            for value in batch.column(0).cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
                row += 1
                prompt = not_text(column, None) if value is None else value.decode("utf-8", "surrogateescape")
                yield f"row {row}", prompt
    except PromptError:
        raise
    except Exception as error:  # raised by pyarrow, or by an extension type that another library registered
        reason = str(error).strip().split("\n")[0]
        raise PromptError(f"cannot be read as Parquet: {reason}") from None


def _text_column(schema: pa.Schema, column: str) -> str:
    column = column_of(column, schema.names)
    kind = schema.field(column).type
    if not _is_text(kind):
        raise PromptError(f"`{column}` must be one column of text, got {kind}; set `column` to another")
    return column


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

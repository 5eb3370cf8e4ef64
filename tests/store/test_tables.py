"""Tensor columns in Parquet files, read back here and by programs that lack Arrow's tensor type."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.store import read_table, table_bytes, table_schema, write_table, write_tables
from cdpo_ray.store.tables import SHAPE

VALUES = np.arange(5 * 3 * 2 * 4, dtype=np.float16).reshape(5, 3, 2, 4)


def rows(values: np.ndarray = VALUES) -> pa.Table:
    return pa.table({"prompt_index": range(len(values)), "latents": tensor_column(values)})


def test_tensors_come_back_with_their_shape_and_dtype_even_from_several_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    write_tables([rows(VALUES[:2]), rows(VALUES[2:])], path)
    read = read_table(path)
    assert read.schema == table_schema(path) == rows().schema
    assert np.array_equal(read["latents"].combine_chunks().to_numpy_ndarray(), VALUES)


def test_row_groups_hold_as_many_tensors_as_fit_and_at_least_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes, path = VALUES[0].nbytes, tmp_path / "samples.parquet"
    for limit, expected in [(1, [1] * 5), (2 * row_bytes, [2, 2, 1]), (3 * row_bytes - 1, [2, 2, 1]), (10**6, [5])]:
        monkeypatch.setattr("cdpo_ray.store.tables.GROUP_BYTES", limit)
        write_table(rows(), path)
        metadata = pq.read_metadata(path)
        assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == expected
        assert read_table(path).equals(rows())


def test_equal_rows_give_equal_bytes_however_they_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdpo_ray.store.tables.GROUP_BYTES", 2 * VALUES[0].nbytes)
    for cuts in ([1], [3], [1, 2, 4]):
        chunks = pa.concat_tables([rows().slice(first, end - first) for first, end in pairwise([0, *cuts, 5])])
        assert table_bytes(chunks) == table_bytes(rows())


def test_a_file_holds_plain_lists_which_pandas_reads(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    write_table(rows(), path)
    field = pq.read_schema(path).field("latents")
    assert field.type == pa.list_(pa.field("element", pa.float16()), 3 * 2 * 4)
    assert json.loads(field.metadata[SHAPE]) == [3, 2, 4]
    flat = pq.read_table(path).to_pandas()["latents"]
    assert np.array_equal(np.stack(flat).reshape(VALUES.shape), VALUES)


def test_a_table_without_rows_keeps_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "samples.parquet"
    write_table(rows().slice(0, 0), path)
    assert read_table(path).schema == rows().schema


def test_a_file_with_arrows_own_tensor_type_is_still_read(tmp_path: Path) -> None:
    pq.write_table(rows(), tmp_path / "old.parquet")
    assert read_table(tmp_path / "old.parquet").equals(rows())
    assert table_schema(tmp_path / "old.parquet") == rows().schema


@pytest.mark.parametrize("shape", [[3, 2, 5], [-3, -2, 4], "x", [24.0], {"a": 1}, [True, 24]])
def test_a_shape_that_does_not_fit_the_values_is_refused(tmp_path: Path, shape: Any) -> None:
    listed = pa.FixedSizeListArray.from_arrays(pa.array(VALUES.ravel()), 24)
    field = pa.field("latents", listed.type, metadata={SHAPE: json.dumps(shape)})
    pq.write_table(pa.table([listed], pa.schema([field])), tmp_path / "bad.parquet")
    for read in (read_table, table_schema):
        with pytest.raises(pa.ArrowInvalid, match=r"column latents: `shape` must be that of 24 values, got "):
            read(tmp_path / "bad.parquet")

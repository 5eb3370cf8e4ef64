"""Parts of an evaluation -> `comparison.parquet` and the rows from which the metrics are computed."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdpo_ray.dataflow.parts import Part, read_part, shards_of, whole_prompts
from cdpo_ray.evaluation.appearance_columns import add_diversity
from cdpo_ray.records import CATEGORY, PIXEL_COLUMNS
from cdpo_ray.store import write_tables

ROW_GROUP_BYTES = 64 * 2**20


def join_comparison(
    parts: Sequence[Part],
    path: Path,
    categories: Mapping[str, str],
    images_per_prompt: int,
    *,
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> pa.Table:
    """Write parts atomically as one file with one row per image, in the order of the parts.

    Memory holds one row group, not the images of all parts.

    Args:
        parts: at least one with a whole prompt, in prompt order; not deleted.
        categories: by prompt; empty: no prompt has one, and there is no column of categories.
        row_group_bytes: a row group ends with the part that makes it reach this size.

    Returns:
        The rows of all parts, one per prompt, without the image columns.

    Raises:
        StoreError: a part was altered since it was written.
    """

    kept: list[pa.Table] = []

    def row_groups() -> Iterator[pa.Table]:
        for group in shards_of(parts, row_group_bytes):
            pieces = (read_part(part.path) for part in group)
            if rows := whole_prompts(pieces, images_per_prompt, add_diversity):
                rows = with_categories(rows, categories)
                kept.append(rows.drop_columns([name for name in PIXEL_COLUMNS.values() if name in rows.column_names]))
                yield row_per_image(rows)

    write_tables(row_groups(), path)
    return pa.concat_tables(kept)


def with_categories(rows: pa.Table, categories: Mapping[str, str]) -> pa.Table:
    """Rows of prompts with a column of their categories, null where there is none; unchanged if no prompt has one.

    Args:
        categories: by prompt.
    """
    if not categories:
        return rows
    found = [categories.get(prompt) for prompt in rows["prompt"].to_pylist()]
    return rows.append_column(CATEGORY, pa.array(found, pa.string()))


def row_per_image(rows: pa.Table) -> pa.Table:
    """Rows of prompts, whose list columns have one value per image -> one row per image."""
    lists = [name for name in rows.column_names if pa.types.is_list(rows.schema.field(name).type)]
    num_images = len(rows[lists[0]][0])
    columns = ["prompt_index", "prompt_id", "prompt", *({CATEGORY} & {*rows.column_names})]
    repeated = rows.select(columns).take(np.repeat(np.arange(rows.num_rows), num_images))
    repeated = repeated.append_column("sample_index", pa.array(np.tile(np.arange(num_images), rows.num_rows)))
    for name in lists:  # chunk by chunk: more than 2 GiB of images in one chunk overflow Arrow's offsets
        repeated = repeated.append_column(name, pc.list_flatten(rows[name]))
    return repeated

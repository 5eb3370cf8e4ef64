"""Compared images -> columns of appearance and diversity; needs no model."""

import pyarrow as pa

from cdpo_ray.dataflow.columns import list_column
from cdpo_ray.dataflow.images import decode_pngs, pairwise_rms_distance
from cdpo_ray.dataflow.parts import images_of
from cdpo_ray.evaluation.appearance import APPEARANCE
from cdpo_ray.records import PIXEL_COLUMNS


def add_appearance(rows: pa.Table) -> pa.Table:
    """Add the appearance and diversity of images to rows with columns of pixels.

    After the other columns of each model, or at the end for a column `pixels`: one list column per measure of
    `APPEARANCE`, and `diversity`, which is ``None`` if a prompt has one image, and of a piece of a prompt.
    """
    for pixels in [name for name in rows.column_names if name in PIXEL_COLUMNS]:
        model = pixels.removesuffix("pixels")  # `base_`, `tuned_` or nothing
        per_prompt = rows[pixels].combine_chunks().to_numpy_ndarray()
        num_images = per_prompt.shape[1]
        images = per_prompt.reshape(-1, *per_prompt.shape[2:])
        added = {name: list_column(measure(images), num_images, pa.float64()) for name, measure in APPEARANCE.items()}
        has_diversity = num_images > 1 and images_of(rows) is None
        diversity = [pairwise_rms_distance(images) if has_diversity else None for images in per_prompt]
        added["diversity"] = pa.array(diversity, pa.float64())
        position = 1 + max(index for index, name in enumerate(rows.column_names) if name.startswith(model))
        for offset, (name, values) in enumerate(added.items()):
            rows = rows.add_column(position + offset, f"{model}{name}", values)
    return rows


def add_diversity(row: pa.Table) -> pa.Table:
    """Fill in the diversity of a prompt's images, whose pieces are joined."""
    for pngs in [name for name in row.column_names if name in PIXEL_COLUMNS.values()]:
        name = f"{pngs.removesuffix('images').removesuffix('image')}diversity"
        images = row[pngs][0].as_py()
        places = [f"prompt {row['prompt_index'][0]}: {pngs} {number}" for number in range(len(images))]
        value = pa.array([pairwise_rms_distance(decode_pngs(images, places))], pa.float64())
        row = row.set_column(row.column_names.index(name), name, value)
    return row

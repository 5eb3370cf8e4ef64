"""Columns of appearance and diversity: after the other columns of each model, one value per image or per prompt."""

import numpy as np
import pyarrow as pa
import pytest

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.dataflow.images import encode_pixels, pairwise_rms_distance
from cdpo_ray.dataflow.parts import whole_prompts
from cdpo_ray.evaluation.appearance import APPEARANCE
from cdpo_ray.evaluation.appearance_columns import add_appearance, add_diversity

NUM_PROMPTS = 3
PIECES = ((0, 1), (1, 3))
MEASURED = [*APPEARANCE, "diversity"]


def pixels_of(arm: str, num_images: int) -> np.ndarray:
    shape = (NUM_PROMPTS, num_images, 3, 8, 6)
    return np.random.default_rng(len(arm)).integers(0, 256, shape, dtype=np.uint8)


def compared(num_images: int) -> pa.Table:
    scores = [[0.5] * num_images] * NUM_PROMPTS
    return pa.table(
        {
            "prompt_index": range(NUM_PROMPTS),
            "base_pixels": tensor_column(pixels_of("base", num_images)),
            "base_score_clip": scores,
            "implicit_value": scores,
            "tuned_pixels": tensor_column(pixels_of("tuned", num_images)),
            "tuned_score_clip": scores,
        }
    )


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize("num_tables", [1, 2])
def test_columns_follow_those_of_their_model_and_values_belong_to_their_image(num_images: int, num_tables: int) -> None:
    rows = compared(num_images)
    rows = rows if num_tables == 1 else pa.concat_tables([rows.slice(0, 1), rows.slice(1)])
    found = add_appearance(rows)
    assert found.column_names == [
        *("prompt_index", "base_pixels", "base_score_clip", *(f"base_{name}" for name in MEASURED), "implicit_value"),
        *("tuned_pixels", "tuned_score_clip", *(f"tuned_{name}" for name in MEASURED)),
    ]
    for arm in ("base", "tuned"):
        for prompt, images in enumerate(pixels_of(arm, num_images)):
            for name, measure in APPEARANCE.items():
                assert found[f"{arm}_{name}"][prompt].as_py() == pytest.approx(list(measure(images)), rel=1e-6)
            diversity = pairwise_rms_distance(images) if num_images > 1 else None
            assert found[f"{arm}_diversity"][prompt].as_py() == diversity


def test_the_joined_pieces_of_a_prompt_have_the_columns_of_the_whole_prompt() -> None:
    whole = compared(3).slice(0, 1)
    pieces = []
    for start, stop in PIECES:
        columns = {"prompt_index": [0], "image_start": [start], "image_stop": [stop]}
        for name in whole.column_names[1:]:
            values = whole[name].combine_chunks()
            is_pixels = name.endswith("pixels")
            columns[name] = (
                tensor_column(values.to_numpy_ndarray()[:, start:stop])
                if is_pixels
                else [values[0].as_py()[start:stop]]
            )
        piece = encode_pixels(add_appearance(pa.table(columns)))
        assert piece["base_diversity"].null_count == 1, "of a piece there is none"
        pieces.append(piece)
    expected = encode_pixels(add_appearance(whole))
    found = whole_prompts(pieces, 3, add_diversity)
    assert found is not None
    assert found.select(expected.column_names).to_pydict() == expected.to_pydict()

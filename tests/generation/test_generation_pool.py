"""Calls of the actors: every image once, split by the configuration alone."""

from dataclasses import replace

import pyarrow as pa
import pytest

from cdpo_ray.dataflow.parts import images_of
from cdpo_ray.generation.generator import Sampling
from cdpo_ray.generation.pool import calls_of
from cdpo_ray.records import prompt_id

PROMPTS = [f"prompt {number}" for number in range(7)]
SAMPLING = Sampling(0, 5, 1, 1.0, None, None, images_per_batch=2)


def made_by(calls: list[pa.Table], images_per_prompt: int) -> list[tuple[int, int]]:
    """(prompt, image) in the order of the calls."""
    return [
        (prompt, image)
        for call in calls
        for prompt in call["prompt_index"].to_pylist()
        for image in images_of(call) or range(images_per_prompt)
    ]


@pytest.mark.parametrize("images_per_prompt", [1, 2, 3, 8, 9, 64])
@pytest.mark.parametrize("images_per_batch", [1, 2, 4, 5, 16, 100])
def test_calls_make_every_image_once_in_order_and_none_makes_more_than_a_batch(
    images_per_prompt: int, images_per_batch: int
) -> None:
    sampling = replace(SAMPLING, images_per_prompt=images_per_prompt, images_per_batch=images_per_batch)
    calls = calls_of(PROMPTS, sampling, {}, set())
    expected = [(prompt, image) for prompt in range(7) for image in range(images_per_prompt)]
    assert made_by(calls, images_per_prompt) == expected
    sizes = [call.num_rows * len(images_of(call) or range(images_per_prompt)) for call in calls]
    assert max(sizes) <= images_per_batch
    if images_per_prompt > images_per_batch:
        assert max(sizes) - min(sizes) < len(sampling.pieces), "pieces are even"
        assert len(calls) == 7 * -(-images_per_prompt // images_per_batch), "and as few as possible"
    for call in calls:
        assert call["prompt"].to_pylist() == [PROMPTS[row] for row in call["prompt_index"].to_pylist()]
        assert call["prompt_id"].to_pylist() == [prompt_id(prompt) for prompt in call["prompt"].to_pylist()]


@pytest.mark.parametrize("images_per_batch", [1, 2, 3, 4])
def test_a_later_attempt_makes_exactly_the_missing_images_also_with_another_batch_size(images_per_batch: int) -> None:
    held = {0: {0, 1}, 1: {0, 1, 2, 3, 4}, 2: {2, 3}, 3: {4}}
    sampling = replace(SAMPLING, images_per_batch=images_per_batch)
    done = {1, 5}  # 5: quarantined
    expected = [
        (prompt, image) for prompt in (0, 2, 3, 4, 6) for image in range(5) if image not in held.get(prompt, set())
    ]
    assert made_by(calls_of(PROMPTS, sampling, held, done), 5) == expected


def test_whole_prompts_that_are_held_or_quarantined_are_left_out_of_their_calls() -> None:
    sampling = replace(SAMPLING, images_per_batch=10)
    calls = calls_of(PROMPTS, sampling, {2: {0, 1, 2, 3, 4}}, {4, 5, 2})
    assert [call["prompt_index"].to_pylist() for call in calls] == [[0, 1], [3], [6]]

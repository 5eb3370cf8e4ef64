"""Prompts masked to increasing degrees."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from cdpo_ray.dataflow.images import encode_pixels
from cdpo_ray.generation.generator import Generator, Sampling
from cdpo_ray.generation.perturbation import masked_positions, masked_shares, perturbed


def test_shares_rise_evenly_from_the_clean_prompt_to_the_maximum() -> None:
    assert masked_shares(5, 0.8, 10) == [0, 0.2, 0.4, 0.6, 0.8]
    assert masked_shares(1, 0.8, 10) == [0]


def test_samples_with_the_same_mask_have_the_same_share() -> None:
    shares = masked_shares(500, 0.9, 77)
    sizes = [int(masked_positions(77, share, seed=0, prompt="a cat").sum()) for share in shares]
    assert shares == [size / 77 for size in sizes] == sorted(shares)
    assert sizes[0] == 0 and sizes[-1] == 69 and set(sizes) == set(range(70))


@pytest.mark.parametrize("num_tokens", [1, 16, 77])
def test_masks_are_nested_and_have_the_requested_size(num_tokens: int) -> None:
    masks = [masked_positions(num_tokens, share, seed=0, prompt="a cat") for share in masked_shares(9, 1.0, num_tokens)]
    assert [int(mask.sum()) for mask in masks] == [round(index / 8 * num_tokens) for index in range(9)]
    assert not masks[0].any() and masks[-1].all()
    assert all((smaller <= larger).all() for smaller, larger in itertools.pairwise(masks))


def test_a_mask_is_a_function_of_the_seed_and_the_prompt() -> None:
    def masks(seed: int, prompt: str) -> list[bool]:
        return masked_positions(77, 0.5, seed=seed, prompt=prompt).tolist()

    assert masks(0, "a cat") == masks(0, "a cat")
    assert masks(0, "a cat") != masks(1, "a cat")
    assert masks(0, "a cat") != masks(0, "a dog")


def test_masked_positions_are_the_empty_prompts_and_pooled_embeddings_are_interpolated() -> None:
    conditioning = {"prompt_embedding": torch.ones(2, 3, 2), "pooled_embedding": torch.ones(2, 4)}
    empty = {"prompt_embedding": torch.full((1, 3, 2), -5.0), "pooled_embedding": torch.full((1, 4), -5.0)}
    found = perturbed(conditioning, empty, [0.0, 0.5], torch.tensor([[False, False, False], [True, False, True]]))
    assert found["prompt_embedding"][:, :, 0].tolist() == [[1, 1, 1], [-5, 1, -5]]
    assert found["pooled_embedding"][:, 0].tolist() == [1, -2]


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_only_the_first_image_has_the_clean_prompt_and_scores_are_the_negative_shares(
    family: str, tiny_models: Callable[[str], Path]
) -> None:
    model = {"path": str(tiny_models(family)), "device": "cpu"}
    rows = pa.table({"prompt_index": [0, 1], "prompt": ["a red circle", "a blue square"]})
    plain = Sampling(3, 3, 2, 1.0, None, None, images_per_batch=2)
    masking = Sampling(3, 3, 2, 1.0, None, None, images_per_batch=2, max_masked_fraction=0.8)
    clean, masked = (encode_pixels(Generator(family, model, sampling)(rows)) for sampling in (plain, masking))
    assert masked["score_perturbation"].to_pylist() == [[0, -31 / 77, -62 / 77]] * 2
    assert "score_perturbation" not in clean.column_names
    for row in range(2):
        same = [
            one == other for one, other in zip(clean["images"][row].as_py(), masked["images"][row].as_py(), strict=True)
        ]
        assert same == [True, False, False]
    assert clean["prompt_embedding"].equals(masked["prompt_embedding"])  # training sees the clean prompt

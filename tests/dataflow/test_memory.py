"""If memory runs out, batches get smaller; the images stay the same."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cdpo_ray.dataflow.memory import BatchSize, is_out_of_memory
from cdpo_ray.errors import ModelError
from cdpo_ray.generation.generator import Generator, Sampling
from cdpo_ray.models import load_model
from cdpo_ray.records import prompt_id

SAMPLING = Sampling(
    seed=3, images_per_prompt=3, num_denoising_steps=1, guidance_scale=1.0, height=None, width=None, images_per_batch=8
)
PROMPTS = ["a cat", "a dog", "a goat"]
ABSURD = 10**17


def table() -> pa.Table:
    ids = [prompt_id(prompt) for prompt in PROMPTS]
    return pa.table({"prompt_index": pa.array([0, 1, 2], pa.int64()), "prompt_id": ids, "prompt": PROMPTS})


@pytest.fixture(scope="module")
def made(tiny_sd15: Path) -> pa.Table:
    return make_generator(tiny_sd15)(table())


def make_generator(model: Path) -> Generator:
    return Generator("stable_diffusion", {"path": str(model), "device": "cpu"}, SAMPLING)


def fit_at_most(module: torch.nn.Module, num_images: int, batches: list[int]) -> None:
    """Make the module request an impossible allocation if its batch has more images."""

    def ask(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        batches.append(len(inputs[0]))
        if len(inputs[0]) > num_images:
            torch.empty(ABSURD, dtype=torch.uint8)

    module.register_forward_pre_hook(ask)


@pytest.mark.parametrize("part", ["unet", "decoder"])
@pytest.mark.parametrize("num_fit", [1, 2, 5])
def test_fault_08_out_of_memory_halves_the_batch_permanently_and_gives_the_same_images(
    part: str, num_fit: int, tiny_sd15: Path, made: pa.Table, caplog: pytest.LogCaptureFixture
) -> None:
    generator, batches = make_generator(tiny_sd15), []
    pipeline = generator.model.pipeline
    fit_at_most(pipeline.unet if part == "unet" else pipeline.vae.decoder, num_fit, batches)
    with caplog.at_level(logging.WARNING):
        found = generator(table())
    kept = 4 if num_fit == 5 else num_fit
    assert found["images_per_batch"].to_pylist() == [kept] * 3
    tried = [size for size in (8, 4, 2) if size > num_fit]
    assert batches[: len(tried)] == tried and set(batches[len(tried) :]) <= {kept, 9 % kept}
    assert [record.message for record in caplog.records] == [
        f"out of memory with {size} images at once, continuing with {size // 2}" for size in tried
    ]
    latents, expected = (rows["latents"].combine_chunks().to_numpy_ndarray() for rows in (found, made))
    np.testing.assert_allclose(latents, expected, rtol=1e-4, atol=1e-5)  # batches of another size round differently
    batches.clear()
    generator(table())
    assert max(batches) == kept, "the size that fits is kept"


def test_fault_08_an_image_that_does_not_fit_names_model_size_needed_and_free_memory(tiny_sd15: Path) -> None:
    generator = make_generator(tiny_sd15)
    fit_at_most(generator.model.pipeline.unet, 0, [])
    with pytest.raises(
        ModelError,
        match=rf"`model.path` {tiny_sd15}: out of memory with one image of 64x64 pixels: {ABSURD} bytes needed,"
        r" \d+ bytes free on cpu; choose a smaller image",
    ):
        generator(table())


def test_fault_08_the_size_of_an_image_that_does_not_fit_is_in_pixels_for_every_size_of_latents(
    tiny_models: Callable[[str], Path],
) -> None:
    for family in ("stable_diffusion", "flux2", "sana"):
        model = load_model(family, path=str(tiny_models(family)), device="cpu")
        with pytest.raises(ModelError, match="one image of 128x64 pixels: more memory needed"):
            BatchSize(1).halve(MemoryError(), 1, model, model.latent_shape(128, 64))


def test_only_a_failed_allocation_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="allocate") as raised:
        torch.empty(ABSURD, dtype=torch.uint8)
    assert is_out_of_memory(raised.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

"""Specific to SD3: errors along the straight path, three text encoders."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdpo_ray.models.stable_diffusion_3 import StableDiffusion3
from cdpo_ray.randomness.noise import noise_at

TinyModels = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models("stable_diffusion_3")


def test_errors_equal_those_of_the_velocity_in_float64(folder: Path) -> None:
    model = StableDiffusion3.load(str(folder), device="cpu", for_training=True)
    time = torch.tensor([0.003, 0.4, 0.97])
    latents, noise = noise_at((3, 16, 8, 6), 0, "latents"), noise_at((3, 16, 8, 6), 0, "noise")
    conditioning, _ = model.encode_prompts(["x", "y", "z"])
    transformer = copy.deepcopy(model.denoiser).double()
    share = time.double()[:, None, None, None]
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents, conditioning, {"timestep": 1000 * time}, noise)
        found = model.errors(model.denoiser, task)
        output = transformer(
            hidden_states=(1 - share) * latents.double() + share * noise.double(),
            timestep=1000 * time.double(),
            encoder_hidden_states=conditioning["prompt_embedding"].double(),
            pooled_projections=conditioning["pooled_embedding"].double(),
        ).sample
    expected = ((output - (noise.double() - latents.double())) ** 2).mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_empty_conditioning_equals_the_stock_pipelines(folder: Path) -> None:
    model = StableDiffusion3.load(str(folder), device="cpu")
    with torch.no_grad():
        encoded = model.pipeline.encode_prompt("x", prompt_2=None, prompt_3=None, device="cpu")
    assert torch.equal(model.empty_conditioning["prompt_embedding"], encoded[1])
    assert torch.equal(model.empty_conditioning["pooled_embedding"], encoded[3])


@pytest.mark.parametrize(("length", "cut"), [(100, 0), (254, 0), (255, 1), (300, 46)])
def test_tokens_beyond_the_t5_limit_of_256_are_counted(folder: Path, length: int, cut: int) -> None:
    model = StableDiffusion3.load(str(folder), device="cpu")
    conditioning, num_cut = model.encode_prompts(["a" * length, "b"])  # one token per letter, one before and one after
    assert num_cut == [cut, 0]
    assert conditioning["prompt_embedding"].shape == (2, 77 + 256, 64)

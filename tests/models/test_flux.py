"""Specific to FLUX: patches, their positions, guidance conditioning."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from cdpo_ray.models.flux import Flux, pack, patch_ids, unpack
from cdpo_ray.randomness.noise import generator_at, noise_at

TinyModels = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models("flux")


def test_packed_latents_equal_the_stock_pipelines_and_unpacking_inverts_packing() -> None:
    latents = noise_at((2, 16, 6, 4), 0, "latents")
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 16, 6, 4))
    assert torch.equal(unpack(tokens, 6, 4), latents)
    assert torch.equal(unpack(tokens, 6, 4), FluxPipeline._unpack_latents(tokens, 48, 32, vae_scale_factor=8))


def test_positions_of_patches_equal_the_stock_pipelines() -> None:
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 2, "cpu", torch.int64)
    assert torch.equal(patch_ids(3, 2, torch.device("cpu"), torch.int64), expected)


def test_errors_equal_those_of_the_velocity_in_float64(folder: Path) -> None:
    model = Flux.load(str(folder), device="cpu", for_training=True)
    time, guidance = torch.tensor([0.003, 0.4, 0.97]), torch.tensor([1.0, 3.5, 8.0])
    latents, noise = noise_at((3, 16, 8, 6), 0, "latents"), noise_at((3, 16, 8, 6), 0, "noise")
    conditioning, _ = model.encode_prompts(["x", "y", "z"])
    transformer = copy.deepcopy(model.denoiser).double()
    share = time.double()[:, None, None, None]
    noisy = (1 - share) * latents.double() + share * noise.double()
    times = {"timestep": 1000 * time, "guidance": guidance}
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents, conditioning, times, noise)
        found = model.errors(model.denoiser, task)
        output = transformer(
            hidden_states=FluxPipeline._pack_latents(noisy, *noisy.shape),
            timestep=time.double(),
            guidance=guidance.double(),
            pooled_projections=conditioning["pooled_embedding"].double(),
            encoder_hidden_states=conditioning["prompt_embedding"].double(),
            txt_ids=torch.zeros(512, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(3, 4, 3, "cpu", torch.float32),
        ).sample
    velocity = FluxPipeline._pack_latents(noise.double() - latents.double(), *noisy.shape)
    expected = ((output - velocity) ** 2).mean(dim=(1, 2)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_guidance_in_training_is_uniform_between_the_bounds(folder: Path) -> None:
    model = Flux.load(str(folder), device="cpu", for_training=True)
    assert model.draw_times(generator_at(0))["guidance"] == 3.5
    model.guidance_range = (2.0, 6.0)
    drawn = torch.stack([model.draw_times(generator_at(number))["guidance"] for number in range(200)])
    assert 2 <= drawn.min() < 2.2 and 5.8 < drawn.max() <= 6
    assert drawn.mean() == pytest.approx(4, abs=4 * 4 / (12 * 200) ** 0.5)


def test_a_model_without_guidance_embedding_draws_no_guidance(tiny_models: TinyModels) -> None:
    model = Flux.load(str(tiny_models("flux_schnell")), device="cpu", for_training=True)
    assert set(model.draw_times(generator_at(0))) == {"timestep"}


def test_the_default_image_size_is_the_pipelines(folder: Path) -> None:
    model = Flux.load(str(folder), device="cpu")
    assert model.latent_shape(None, None) == (16, 128, 128)
    assert model.latent_shape(32, 64) == (16, 4, 8)


@pytest.mark.parametrize(
    ("name", "limit", "length", "cut"),
    [
        ("flux", 512, 100, 0),
        ("flux", 512, 510, 0),
        ("flux", 512, 511, 1),
        ("flux", 512, 600, 90),
        ("flux_schnell", 256, 254, 0),
        ("flux_schnell", 256, 255, 1),
        ("flux_schnell", 256, 600, 346),
    ],
)
def test_tokens_beyond_the_t5_limit_of_the_model_are_counted(
    tiny_models: TinyModels, name: str, limit: int, length: int, cut: int
) -> None:
    model = Flux.load(str(tiny_models(name)), device="cpu")
    conditioning, num_cut = model.encode_prompts(["a" * length, "b"])
    assert num_cut == [cut, 0]
    assert conditioning["prompt_embedding"].shape == (2, limit, 32)
    with torch.no_grad():
        stock, *_ = model.pipeline.encode_prompt(["a" * length, "b"], None, device="cpu", max_sequence_length=limit)
    assert torch.equal(conditioning["prompt_embedding"], stock)

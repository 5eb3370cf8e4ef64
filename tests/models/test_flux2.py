"""Specific to FLUX.2 klein: normalised patches, their positions, distilled models."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor

from cdpo_ray.errors import ModelError
from cdpo_ray.models.flux2 import Flux2, from_patches, from_rows, grid_ids, to_patches, to_rows
from cdpo_ray.randomness.noise import noise_at

TinyModels = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models("flux2")


@pytest.fixture(scope="module")
def model(folder: Path) -> Flux2:
    return Flux2.load(str(folder), device="cpu")


def test_patches_and_rows_equal_the_stock_pipelines_and_are_inverted() -> None:
    latents = noise_at((2, 8, 6, 4), 0, "latents")
    patches = to_patches(latents)
    assert torch.equal(patches, Flux2KleinPipeline._patchify_latents(latents))
    assert torch.equal(from_patches(patches), latents)
    rows = to_rows(patches)
    assert torch.equal(rows, Flux2KleinPipeline._pack_latents(patches))
    assert torch.equal(from_rows(rows, 3, 2), patches)


def test_positions_equal_the_stock_pipelines() -> None:
    cpu = torch.device("cpu")
    image, text = torch.zeros(1, 8, 3, 2), torch.zeros(1, 5, 16)
    assert torch.equal(grid_ids((1, 3, 2, 1), cpu), Flux2KleinPipeline._prepare_latent_ids(image)[0])
    assert torch.equal(grid_ids((1, 1, 1, 5), cpu), Flux2KleinPipeline._prepare_text_ids(text)[0])


def test_decoded_latents_are_the_images_of_the_stock_pipeline_exactly_also_in_16_bits(folder: Path) -> None:
    model = Flux2.load(str(folder), device="cpu", dtype="bfloat16")
    conditioning, _ = model.encode_prompts(["x", "y"])
    noise = noise_at((2, *model.latent_shape(64, 48)), 0, "noise")
    ours = model.decode(model.sample(conditioning, noise, num_denoising_steps=2, guidance_scale=4.0))
    stock = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    call: dict[str, Any] = {"height": 64, "width": 48, "num_inference_steps": 2, "guidance_scale": 4.0}
    latents = stock(prompt=["x", "y"], latents=noise, output_type="latent", **call).images
    with torch.no_grad():
        pixels = stock.vae.decode(latents, return_dict=False)[0]
    assert torch.equal(ours, ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8))


def test_encoded_images_are_the_latents_of_the_pipelines_editing_with_the_spread_of_the_posterior(
    model: Flux2,
) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 48), dtype=torch.uint8)
    mean, std = model.encode(images)
    with torch.no_grad():
        expected = model.pipeline._encode_vae_image(images.float() / 127.5 - 1, generator=None)
        posterior = model.pipeline.vae.encode(images.float() / 127.5 - 1).latent_dist
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)
    assert mean.shape == std.shape == (2, *model.latent_shape(64, 48))
    norm = model.pipeline.vae.bn

    def inverted(latents: Tensor) -> Tensor:
        root = (norm.running_var + model.pipeline.vae.config.batch_norm_eps).sqrt()
        return from_patches(latents * root[:, None, None] + norm.running_mean[:, None, None])

    torch.testing.assert_close(inverted(mean), posterior.mean, rtol=1e-5, atol=1e-5)
    draw = noise_at(tuple(posterior.mean.shape), 0, "draw")
    drawn = inverted(mean + std * to_patches(draw))
    torch.testing.assert_close(drawn, posterior.mean + posterior.std * draw, rtol=1e-4, atol=1e-5)


def test_errors_equal_those_of_the_velocity_in_float64(folder: Path) -> None:
    model = Flux2.load(str(folder), device="cpu", for_training=True)
    time = torch.tensor([0.003, 0.4, 0.97])
    latents, noise = noise_at((3, 32, 4, 3), 0, "latents"), noise_at((3, 32, 4, 3), 0, "noise")
    conditioning, _ = model.encode_prompts(["x", "y", "z"])
    transformer = copy.deepcopy(model.denoiser).double()
    share = time.double()[:, None, None, None]
    noisy = (1 - share) * latents.double() + share * noise.double()

    def rows(values: Tensor) -> Tensor:
        return Flux2KleinPipeline._pack_latents(values)

    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents, conditioning, {"timestep": 1000 * time}, noise)
        found = model.errors(model.denoiser, task)
        output = transformer(
            hidden_states=rows(noisy),
            timestep=time.double(),
            encoder_hidden_states=conditioning["prompt_embedding"].double(),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(conditioning["prompt_embedding"]),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy),
        ).sample
    expected = ((output - rows(noise.double() - latents.double())) ** 2).mean(dim=(1, 2)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_a_distilled_model_is_sampled_without_guidance_and_refuses_it(tiny_models: TinyModels) -> None:
    model = Flux2.load(str(tiny_models("flux2_distilled")), device="cpu")
    conditioning, _ = model.encode_prompts(["x"])
    noise = noise_at((1, *model.latent_shape(32, 32)), 0, "noise")
    assert model.sample(conditioning, noise, num_denoising_steps=1, guidance_scale=1).isfinite().all()
    with pytest.raises(ModelError, match=r"^`generation.guidance_scale` is 4, but .* is distilled .*; set it to 1, or"):
        model.sample(conditioning, noise, num_denoising_steps=1, guidance_scale=4)


def test_the_default_image_size_is_the_pipelines(model: Flux2) -> None:
    assert model.latent_shape(None, None) == (32, 64, 64)
    assert model.latent_shape(32, 64) == (32, 2, 4)


@pytest.mark.parametrize(("length", "cut"), [(100, 0), (487, 0), (488, 1), (600, 113)])
def test_tokens_of_the_chat_beyond_the_limit_of_512_are_counted(model: Flux2, length: int, cut: int) -> None:
    conditioning, num_cut = model.encode_prompts(["a" * length, "b"])  # one token per letter, 25 of the template
    assert num_cut == [cut, 0]
    assert conditioning["prompt_embedding"].shape == (2, 512, 3 * 32)
    with torch.no_grad():
        stock, _ = model.pipeline.encode_prompt(["a" * length, "b"])
    assert torch.equal(conditioning["prompt_embedding"], stock)

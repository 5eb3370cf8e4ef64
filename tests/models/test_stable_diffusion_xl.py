"""Specific to SDXL: size conditioning, empty prompt, a VAE that overflows in fp16."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline

from cdpo_ray.models.stable_diffusion_xl import StableDiffusionXL
from cdpo_ray.randomness.noise import noise_at

TinyModels = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models("stable_diffusion_xl")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_errors_equal_those_of_the_unet_with_the_ddpm_scheduler_in_float64(folder: Path, prediction_type: str) -> None:
    model = StableDiffusionXL.load(str(folder), device="cpu", for_training=True)
    model.prediction_type = prediction_type
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 400, 999])
    latents, noise = noise_at((3, 4, 8, 6), 0, "latents").double(), noise_at((3, 4, 8, 6), 0, "noise").double()
    conditioning, _ = model.encode_prompts(["x", "y", "z"])
    unet = copy.deepcopy(model.denoiser).double()
    size = torch.tensor([[64.0, 48, 0, 0, 64, 48]]).double().repeat(3, 1)
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents.float(), conditioning, {"timestep": timesteps}, noise)
        found = model.errors(model.denoiser, task)
        output = unet(
            scheduler.add_noise(latents, noise, timesteps),
            timesteps,
            encoder_hidden_states=conditioning["prompt_embedding"].double(),
            added_cond_kwargs={"text_embeds": conditioning["pooled_embedding"].double(), "time_ids": size},
        ).sample
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    expected = ((output - target) ** 2).mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_the_size_conditioning_equals_the_stock_pipelines(folder: Path) -> None:
    model = StableDiffusionXL.load(str(folder), device="cpu", for_training=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    expected = pipeline._get_add_time_ids(
        (64, 48), (0, 0), (64, 48), dtype=torch.float32, text_encoder_projection_dim=32
    )
    assert torch.equal(model.size_ids(torch.zeros(2, 4, 8, 6)).float(), expected.repeat(2, 1))


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_conditioning_equals_the_stock_pipelines(folder: Path, zeros: bool) -> None:
    model = StableDiffusionXL.load(str(folder), device="cpu")
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    _, negative, _, negative_pooled = model.pipeline.encode_prompt("x", device="cpu")
    assert torch.equal(model.empty_conditioning["prompt_embedding"], negative)
    assert torch.equal(model.empty_conditioning["pooled_embedding"], negative_pooled)
    assert (negative.abs().max() == 0) == zeros


@pytest.mark.parametrize(("length", "cut"), [(75, 0), (76, 1), (100, 25)])
def test_tokens_beyond_77_are_counted(folder: Path, length: int, cut: int) -> None:
    conditioning, num_cut = StableDiffusionXL.load(str(folder), device="cpu").encode_prompts(["a" * length, "b"])
    assert num_cut == [cut, 0]
    assert conditioning["prompt_embedding"].shape == (2, 77, 64)


def test_in_fp16_the_decoder_runs_in_fp32_and_images_equal_the_stock_pipelines(folder: Path) -> None:
    model = StableDiffusionXL.load(str(folder), dtype="float16", device="cpu")
    latents = (5 * noise_at((1, 4, 8, 8), 0, "latents")).half()
    stock = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float16)
    stock.vae.to(torch.float32)
    with torch.no_grad():
        decoded = stock.vae.decode(latents.float() / stock.vae.config.scaling_factor).sample
    (image,) = stock.image_processor.postprocess(decoded, output_type="pil")
    assert np.array_equal(model.decode(latents)[0].permute(1, 2, 0).numpy(), np.asarray(image))
    assert (model.denoiser.dtype, model.pipeline.vae.dtype) == (torch.float16, torch.float32)


def test_a_decoder_that_fits_fp16_stays_fp16(folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.vae.register_to_config(force_upcast=False)
    pipeline.save_pretrained(tmp_path)
    model = StableDiffusionXL.load(str(tmp_path), dtype="float16", device="cpu")
    model.decode(torch.zeros(1, 4, 2, 2))
    assert model.pipeline.vae.dtype == torch.float16


@pytest.fixture(scope="module")
def overflowing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a VAE whose activations overflow in fp16, though its weights do not."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    with torch.no_grad():
        for net in (pipeline.vae.encoder, pipeline.vae.decoder):
            net.conv_in.weight.mul_(2.0**18)
    overflowing_dir = tmp_path_factory.mktemp("overflowing")
    pipeline.to(torch.float16).save_pretrained(overflowing_dir)
    return overflowing_dir


def test_fault_36_a_vae_that_overflows_in_fp16_encodes_and_decodes_in_fp32(overflowing: Path) -> None:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    half = StableDiffusionXL.load(str(overflowing), dtype="float16", device="cpu")
    full = StableDiffusionXL.load(str(overflowing), dtype="float32", device="cpu")
    plain = half.pipeline.vae.encode((images.float() / 127.5 - 1).half()).latent_dist.mean
    assert not plain.isfinite().all()
    for ours, expected in zip(half.encode(images), full.encode(images), strict=True):
        assert ours.dtype == torch.float16 and ours.isfinite().all()
        assert torch.equal(ours, expected.half())
    latents = full.encode(images)[0]
    assert torch.equal(half.decode(latents), full.decode(latents))

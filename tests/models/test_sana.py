"""Specific to SANA: the instruction before prompts, the deterministic autoencoder, both samplers, convolutions."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

from cdpo_ray.models.flow_matching import real_tokens
from cdpo_ray.models.lora import attach_lora, save_lora
from cdpo_ray.models.sana import INSTRUCTION, Sana
from cdpo_ray.randomness.noise import noise_at

TinyModels = Callable[[str], Path]
CONVOLUTIONS = ("to_q", "conv_inverted", "conv_point")


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels) -> Path:
    return tiny_models("sana")


@pytest.fixture(scope="module")
def model(folder: Path) -> Sana:
    return Sana.load(str(folder), device="cpu")


def sampled(model: Sana, guidance_scale: float = 3.0) -> torch.Tensor:
    conditioning, _ = model.encode_prompts(["a cat"])
    noise = noise_at((1, *model.latent_shape(64, 32)), 0, "noise")
    return model.sample(conditioning, noise, num_denoising_steps=3, guidance_scale=guidance_scale)


def test_errors_equal_those_of_the_velocity_in_float64(model: Sana) -> None:
    time = torch.tensor([0.003, 0.4, 0.97])
    latents, noise = noise_at((3, 32, 4, 3), 0, "latents"), noise_at((3, 32, 4, 3), 0, "noise")
    conditioning, _ = model.encode_prompts(["x", "a longer prompt", "z"])
    transformer = copy.deepcopy(model.denoiser).double()
    share = time.double()[:, None, None, None]
    embedding = conditioning["prompt_embedding"].double()
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents, conditioning, {"timestep": 1000 * time}, noise)
        found = model.errors(model.denoiser, task)
        output = transformer(
            hidden_states=(1 - share) * latents.double() + share * noise.double(),
            timestep=1000 * time.double(),
            encoder_hidden_states=embedding,
            encoder_attention_mask=(embedding.abs().sum(dim=2) > 0).double(),
        ).sample
    expected = ((output - (noise.double() - latents.double())) ** 2).mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("length", "cut"), [(100, 0), (298, 0), (299, 1), (400, 102)])
def test_tokens_beyond_the_limit_are_counted_and_padding_is_zero(model: Sana, length: int, cut: int) -> None:
    prompts = ["X" * length + " ", "y"]  # encoded without the space, and in lower case
    conditioning, num_cut = model.encode_prompts(prompts)  # one token per letter
    assert num_cut == [cut, 0]
    embedding = conditioning["prompt_embedding"]
    with torch.no_grad():
        stock, mask, _, _ = model.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device="cpu", complex_human_instruction=INSTRUCTION
        )
    assert embedding.shape == stock.shape == (2, 300, 32)
    assert torch.equal(real_tokens(embedding), mask.bool()) and mask[0].all() == (length >= 298)
    assert torch.equal(embedding, stock.masked_fill(mask[:, :, None] == 0, 0))


def test_the_empty_prompt_is_the_stock_pipelines_negative_one_without_the_instruction(model: Sana) -> None:
    with torch.no_grad():
        _, _, stock, mask = model.pipeline.encode_prompt(["x"], device="cpu", complex_human_instruction=INSTRUCTION)
    empty = model.empty_conditioning["prompt_embedding"]
    assert torch.equal(empty, stock.masked_fill(mask[:, :, None] == 0, 0))
    assert real_tokens(empty).sum() == 1, "the first token only"


def test_decoding_inverts_encoding_which_has_no_spread(model: Sana) -> None:
    vae = model.pipeline.vae
    images = torch.randint(0, 256, (2, 3, 64, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    mean, std = model.encode(images)
    assert mean.shape == std.shape == (2, 32, 2, 1) and not std.any()
    with torch.no_grad():
        latents = vae.encode(images.float() / 127.5 - 1).latent
        plain = vae.decode(latents).sample
    torch.testing.assert_close(mean, 0.41407 * latents, rtol=1e-5, atol=1e-6)
    expected = ((plain / 2 + 0.5).clamp(0, 1) * 255).round()
    torch.testing.assert_close(model.decode(mean).float(), expected, rtol=0, atol=1)


def test_latents_have_the_models_dtype_although_the_pipeline_samples_in_fp32(folder: Path) -> None:
    half = Sana.load(str(folder), device="cpu", dtype="bfloat16")
    assert sampled(half).dtype == torch.bfloat16


def test_the_default_image_size_is_the_models(model: Sana) -> None:
    assert model.latent_shape(None, None) == (32, 2, 2)
    assert model.latent_shape(96, 64) == (32, 3, 2)


def test_a_model_with_an_euler_scheduler_is_sampled_as_by_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.save_pretrained(tmp_path / "model")
    model = Sana.load(str(tmp_path / "model"), device="cpu")
    noise = noise_at((1, *model.latent_shape(64, 32)), 0, "noise")
    theirs = pipeline(
        "a cat",
        latents=noise,
        height=64,
        width=32,
        num_inference_steps=3,
        guidance_scale=3.0,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    torch.testing.assert_close(sampled(model), theirs, rtol=1e-4, atol=1e-4)


def test_a_lora_on_the_convolutions_loads_into_the_stock_pipeline(folder: Path, tmp_path: Path) -> None:
    model = Sana.load(str(folder), device="cpu")
    untrained = sampled(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in attach_lora(model.denoiser, rank=2, alpha=4, targets=CONVOLUTIONS, seed=0):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, tmp_path / "lora")
    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "lora")
    loaded = Sana(pipeline, dtype=torch.float32, device="cpu")
    trained = sampled(model)
    torch.testing.assert_close(sampled(loaded), trained, rtol=1e-4, atol=1e-4)
    assert (trained - untrained).abs().max() > 0.01

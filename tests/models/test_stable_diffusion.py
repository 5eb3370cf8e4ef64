"""The Stable Diffusion family against the stock pipeline: same noise, same images."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from cdpo_ray.errors import ModelError
from cdpo_ray.models import load_model
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.randomness.noise import noise_at

PROMPTS = ["a red circle in the middle", "a blue square on the left and a green cross on the right"]


def stock(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def tiny(tiny_sd15: Path) -> StableDiffusion:
    return StableDiffusion.load(str(tiny_sd15), device="cpu")


def assert_images_are_the_stock_pipelines(folder: Path, path: str, guidance_scale: float) -> None:
    model = StableDiffusion.load(path, device="cpu")
    shape = model.latent_shape(None, None)
    noise = torch.stack([noise_at(shape, 0, "image", prompt, 0) for prompt in PROMPTS])
    latents = model.sample(
        model.encode_prompts(PROMPTS)[0], noise, num_denoising_steps=4, guidance_scale=guidance_scale
    )
    ours = model.decode(latents).permute(0, 2, 3, 1).numpy()
    theirs = stock(folder)(
        PROMPTS, latents=noise, num_inference_steps=4, guidance_scale=guidance_scale, output_type="pil"
    ).images
    assert np.array_equal(ours, np.stack([np.asarray(image) for image in theirs]))
    assert not np.array_equal(ours[0], ours[1])


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_images_of_the_tiny_model_equal_the_stock_pipelines(tiny_sd15: Path, guidance_scale: float) -> None:
    assert_images_are_the_stock_pipelines(tiny_sd15, str(tiny_sd15), guidance_scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_images_of_the_embedded_model_equal_the_stock_pipelines(embedded: Path, guidance_scale: float) -> None:
    assert_images_are_the_stock_pipelines(embedded, "embedded", guidance_scale)


def test_guidance_changes_the_latents(tiny: StableDiffusion) -> None:
    noise = noise_at((1, 4, 8, 8), 0, "image", "x", 0)
    conditioning, _ = tiny.encode_prompts(["x"])
    with_it, without = (tiny.sample(conditioning, noise, num_denoising_steps=2, guidance_scale=g) for g in (5.0, 1.0))
    assert not torch.allclose(with_it, without)


def test_another_image_size_is_sampled_at_that_size(tiny: StableDiffusion) -> None:
    assert tiny.latent_shape(None, None) == (4, 8, 8)
    shape = tiny.latent_shape(64, 128)
    assert shape == (4, 8, 16)
    latents = tiny.sample(
        tiny.encode_prompts(["x"])[0], noise_at((1, *shape), 0, "n"), num_denoising_steps=1, guidance_scale=1.0
    )
    assert tiny.decode(latents).shape == (1, 3, 64, 128)


def test_encoding_a_prompt_does_not_depend_on_the_others(tiny: StableDiffusion) -> None:
    together, _ = tiny.encode_prompts(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(
            together["prompt_embedding"][row],
            tiny.encode_prompts([prompt])[0]["prompt_embedding"][0],
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize(("length", "cut"), [(0, 0), (75, 0), (76, 1), (100, 25), (10_000, 9925)])
def test_tokens_beyond_the_limit_of_77_are_counted(tiny: StableDiffusion, length: int, cut: int) -> None:
    conditioning, num_cut = tiny.encode_prompts(["a" * length, "b"])  # one token per letter, a start and an end token
    assert num_cut == [cut, 0]
    assert conditioning["prompt_embedding"].shape[1] == 77


@pytest.mark.parametrize("prompt", ["a 🦊", "nul\x00", "قطة", "../../etc/passwd", "\u2028"])
def test_unusual_prompts_have_finite_embeddings(tiny: StableDiffusion, prompt: str) -> None:
    assert tiny.encode_prompts([prompt])[0]["prompt_embedding"].isfinite().all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_errors_equal_those_of_the_unet_with_the_ddpm_scheduler(tiny_sd15: Path, prediction_type: str) -> None:
    model = StableDiffusion.load(str(tiny_sd15), device="cpu", for_training=True)
    model.prediction_type = prediction_type
    scheduler = DDPMScheduler.from_pretrained(tiny_sd15, subfolder="scheduler")
    timesteps = torch.tensor([0, 400, 999])
    latents, noise = noise_at((3, 4, 8, 8), 0, "latents"), noise_at((3, 4, 8, 8), 0, "noise")
    conditioning, _ = model.encode_prompts(["x", "y", "z"])
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, latents, conditioning, {"timestep": timesteps}, noise)
        found = model.errors(model.denoiser, task)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        output = model.denoiser(noisy, timesteps, conditioning["prompt_embedding"]).sample
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    expected = ((output.double() - target.double()) ** 2).mean(dim=(1, 2, 3)).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_pixels_outside_the_range_are_clamped_not_wrapped(
    tiny: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Decoded:
        sample = torch.tensor([-3.0, -1.0, -0.2, 0.0, 1.0, 3.0]).repeat(3, 1)[None, :, None]

    monkeypatch.setattr(tiny.pipeline.vae, "decode", lambda latents: Decoded())
    assert tiny.decode(torch.zeros(1, 4, 1, 1))[0, 0, 0].tolist() == [0, 0, 102, 128, 255, 255]


def test_training_needs_no_decoder(tiny_sd15: Path) -> None:
    assert StableDiffusion.load(str(tiny_sd15), device="cpu", for_training=True).pipeline.vae is None


def test_weights_have_the_requested_dtype(tiny_sd15: Path) -> None:
    model = load_model("stable_diffusion", path=str(tiny_sd15), dtype="bfloat16", device="cpu", for_training=True)
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.bfloat16}


def test_a_missing_folder_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`model\.path` .*/nowhere \(revision None\): cannot be loaded: "):
        StableDiffusion.load(str(tmp_path / "nowhere"), device="cpu")


def test_weights_that_run_code_are_refused_and_do_not_run(tiny_sd15: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = tmp_path / "model"
    shutil.copytree(tiny_sd15, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.with_suffix(".bin").write_bytes(pickle.dumps({"conv_in.weight": Evil()}))
    weights.unlink()
    with pytest.raises(
        ModelError, match=r"cannot be loaded: .*; give a folder in diffusers layout with safetensors weights"
    ):
        StableDiffusion.load(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()

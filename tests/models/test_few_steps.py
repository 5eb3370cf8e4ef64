"""Models that are sampled in few steps, or from pure noise: schedule, sampler, targets and drawn timesteps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.randomness.noise import generator_at, noise_at

FAMILIES = ("stable_diffusion", "stable_diffusion_xl")
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PROMPTS = ["a red cube", "a bear"]

WithScheduler = Callable[..., Path]


@pytest.fixture
def with_scheduler(tiny_models: Callable[[str], Path], tmp_path: Path) -> WithScheduler:
    """Function that copies a family's tiny model with a scheduler of another kind, and `trailing` timesteps."""

    def copy(family: str, kind: str, **values: Any) -> Path:
        folder = Path(shutil.copytree(tiny_models(family), tmp_path / kind))
        index, scheduler = (folder / name for name in ("model_index.json", "scheduler/scheduler_config.json"))
        index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", kind]}))
        content = json.loads(scheduler.read_text()) | {"_class_name": kind, "timestep_spacing": "trailing"}
        scheduler.write_text(json.dumps(content | {"set_alpha_to_one": False} | values))
        return folder

    return copy


def sampled(model: TextToImageModel, noise: torch.Tensor, num_denoising_steps: int) -> torch.Tensor:
    conditioning, _ = model.encode_prompts(PROMPTS)
    return model.sample(conditioning, noise, num_denoising_steps=num_denoising_steps, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("kind", "num_denoising_steps"),
    [
        ("EulerDiscreteScheduler", 1),
        ("EulerDiscreteScheduler", 2),
        ("EulerDiscreteScheduler", 4),
        ("EulerAncestralDiscreteScheduler", 1),  # with more steps it adds noise
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_few_step_models_are_sampled_as_by_the_scheduler_they_are_published_with(
    family: str, kind: str, num_denoising_steps: int, with_scheduler: WithScheduler
) -> None:
    folder = with_scheduler(family, kind)
    stock = DiffusionPipeline.from_pretrained(folder)
    noise = noise_at((2, 4, 8, 8), 0, "noise")
    sampler = {"num_inference_steps": num_denoising_steps, "guidance_scale": 0.0, "output_type": "latent"}
    expected = stock(PROMPTS, latents=noise.clone(), height=64, width=64, **sampler).images
    found = sampled(load_model(family, path=str(folder), device="cpu"), noise, num_denoising_steps)
    # both start from the noise; Euler's scale of it is sigma, DDIM's sqrt(sigma^2 + 1), 0.2 % more
    assert (found - expected).norm() / expected.norm() < 1e-2


def test_a_single_step_ends_without_noise(with_scheduler: WithScheduler) -> None:
    model = load_model(
        "stable_diffusion", path=str(with_scheduler("stable_diffusion", "EulerDiscreteScheduler")), device="cpu"
    )
    noise = noise_at((2, 4, 8, 8), 0, "noise")
    with torch.no_grad():
        embedding = model.encode_prompts(PROMPTS)[0]["prompt_embedding"]
        epsilon = model.denoiser(noise, torch.tensor(999), encoder_hidden_states=embedding).sample
    signal = model.alphas_cumprod[-1]
    expected = (noise - (1 - signal).sqrt() * epsilon) / signal.sqrt()
    torch.testing.assert_close(sampled(model, noise, 1), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num", "timesteps"), [(1, {999}), (2, {499, 999}), (4, {249, 499, 749, 999})])
def test_a_few_step_model_trains_at_the_timesteps_of_its_sampler(
    family: str, num: int, timesteps: set[int], with_scheduler: WithScheduler
) -> None:
    folder = with_scheduler(family, "EulerDiscreteScheduler")
    rule = {"num_denoising_steps": num}
    model = load_model(family, path=str(folder), device="cpu", for_training=True, timesteps=rule)
    drawn = {int(model.draw_times(generator_at(0, "draw", number))["timestep"]) for number in range(50)}
    assert drawn == timesteps


@pytest.mark.parametrize("family", FAMILIES)
def test_at_zero_terminal_snr_the_input_is_the_noise_and_the_target_minus_the_latents(
    family: str, with_scheduler: WithScheduler
) -> None:
    folder = with_scheduler(family, "EulerDiscreteScheduler", **ZERO_SNR)
    model = load_model(family, path=str(folder), device="cpu")
    latents, noise = noise_at((2, 4, 8, 8), 0, "latents"), noise_at((2, 4, 8, 8), 0, "noise")
    conditioning, _ = model.encode_prompts(PROMPTS)
    times = {"timestep": torch.tensor([999, 999])}
    task = model.denoising_task(model.denoiser, latents, conditioning, times, noise)
    assert torch.equal(task.noisy_latents, noise) and torch.equal(task.target, -latents)
    # one step from there: x0 = -v, whatever the noise
    with torch.no_grad():
        prediction = model.predict(model.denoiser, task)
    torch.testing.assert_close(sampled(model, noise, 1), -prediction, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_terminal_snr_schedule_is_the_published_rescaling(family: str, with_scheduler: WithScheduler) -> None:
    folder = with_scheduler(family, "EulerDiscreteScheduler", **ZERO_SNR)
    model = load_model(family, path=str(folder), device="cpu")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()  # arXiv:2305.08891, algorithm 1: shift the last to 0, scale the first back
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(model.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-6)
    assert model.alphas_cumprod[-1] == 0 and model.prediction_type == "v_prediction"
    assert model.sampler_timesteps(4) == (999, 749, 499, 249)

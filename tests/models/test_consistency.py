"""The maths of consistency models against diffusers' schedulers and closed forms in float64."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler
from torch import Tensor

from cdpo_ray.models.consistency import (
    GRID_STEP,
    NUM_GRID_CELLS,
    boundary_scalings,
    clean_and_noise,
    consistency_function,
    ddim_step,
    guidance_embedding,
    guided,
    pseudo_huber,
)
from cdpo_ray.models.noising import PredictionType
from cdpo_ray.models.seeds import noise_at

GRID = torch.arange(NUM_GRID_CELLS) * GRID_STEP + GRID_STEP - 1
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TYPES: list[PredictionType] = ["epsilon", "v_prediction"]
SHAPE = (NUM_GRID_CELLS, 4, 3, 5)


def ddim(prediction_type: str) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        **SCHEDULE,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(NUM_GRID_CELLS)
    assert scheduler.timesteps.tolist() == GRID.tolist()[::-1]
    return scheduler


def test_the_grid_is_the_one_of_the_paper_and_of_diffusers_sampler() -> None:
    assert (GRID[0].item(), GRID[1].item(), GRID[-1].item()) == (19, 39, 999)
    sampler = LCMScheduler(**SCHEDULE)
    for num_steps in (1, 2, 4, 8, 50):
        sampler.set_timesteps(num_steps)
        assert set(sampler.timesteps.tolist()) <= set(GRID.tolist())


@pytest.mark.parametrize("prediction_type", TYPES)
def test_a_step_down_the_grid_is_the_ddim_schedulers(prediction_type: PredictionType) -> None:
    scheduler = ddim(prediction_type)
    noisy, output = noise_at(SHAPE, 0, "noisy"), noise_at(SHAPE, 0, "output")
    alphas = scheduler.alphas_cumprod
    clean, noise = clean_and_noise(noisy, output, alphas[GRID], prediction_type)
    found = ddim_step(clean, noise, alphas[(GRID - GRID_STEP).clamp(min=0)])
    for row, timestep in enumerate(GRID.tolist()):
        step = scheduler.step(output[row : row + 1], timestep, noisy[row : row + 1], eta=0.0)
        torch.testing.assert_close(clean[row : row + 1], step.pred_original_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[row : row + 1], step.prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_where_the_net_lands_is_what_the_lcm_scheduler_calls_denoised(prediction_type: PredictionType) -> None:
    scheduler = LCMScheduler(**SCHEDULE, prediction_type=prediction_type)
    noisy, output = noise_at(SHAPE, 0, "noisy"), noise_at(SHAPE, 0, "output")
    clean, _ = clean_and_noise(noisy, output, scheduler.alphas_cumprod[GRID], prediction_type)
    found = consistency_function(noisy, clean, GRID)
    for row, timestep in enumerate(GRID.tolist()):
        scheduler.set_timesteps(timesteps=[timestep])
        expected = scheduler.step(output[row : row + 1], timestep, noisy[row : row + 1]).denoised
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-4)


def test_scalings_are_the_schedulers_and_the_papers_closed_form() -> None:
    timesteps = torch.tensor([0, 1, 19, 500, 999])
    found = boundary_scalings(timesteps)
    t = timesteps.double() * 10
    closed = (0.25 / (t**2 + 0.25), t / (t**2 + 0.25).sqrt())
    theirs = LCMScheduler(**SCHEDULE).get_scalings_for_boundary_condition_discrete(timesteps)
    for ours, form, scheduler in zip(found, closed, theirs, strict=True):
        torch.testing.assert_close(ours.double(), form, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours, scheduler, rtol=1e-6, atol=1e-9)


def test_at_timestep_zero_the_latents_stay_as_they_are() -> None:
    noisy, clean = noise_at((2, 4, 3, 3), 0, "noisy"), noise_at((2, 4, 3, 3), 0, "clean")
    assert torch.equal(consistency_function(noisy, clean, torch.zeros(2)), noisy)


def test_v_and_epsilon_of_the_same_noise_agree() -> None:
    clean, noise = noise_at(SHAPE, 0, "clean").double(), noise_at(SHAPE, 0, "noise").double()
    alpha_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod[GRID]
    signal, spread = (root.double()[:, None, None, None] for root in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    noisy, velocity = signal * clean + spread * noise, signal * noise - spread * clean
    found: dict[str, tuple[Tensor, Tensor]] = {
        "epsilon": clean_and_noise(noisy, noise, alpha_bar, "epsilon"),
        "v": clean_and_noise(noisy, velocity, alpha_bar, "v_prediction"),
    }
    for x0, eps in found.values():
        torch.testing.assert_close(x0.double(), clean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(eps.double(), noise, rtol=1e-4, atol=1e-4)


def test_guidance_w_is_a_pipelines_guidance_scale_less_one() -> None:
    told, untold = noise_at((3, 2, 2, 2), 0, "told"), noise_at((3, 2, 2, 2), 0, "untold")
    w = torch.tensor([0.0, 2.0, 7.5])
    scale = (w + 1)[:, None, None, None]
    torch.testing.assert_close(guided(told, untold, w), untold + scale * (told - untold), rtol=1e-5, atol=1e-6)
    assert torch.equal(guided(told, untold, w)[0], told[0])


def test_pseudo_huber_is_its_closed_form() -> None:
    one, other = noise_at((4, 2, 3, 3), 0, "one"), noise_at((4, 2, 3, 3), 0, "other")
    other[0] = one[0]
    other[1] = one[1] + 1e-4
    difference = (one.numpy().astype(np.float64) - other.numpy().astype(np.float64)) ** 2
    expected = (np.sqrt(difference + 0.001**2) - 0.001).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(pseudo_huber(one, other).numpy(), expected, rtol=1e-4, atol=1e-9)
    assert pseudo_huber(one, other)[0] == 0


@pytest.mark.parametrize("channels", [8, 256])
def test_the_guidance_embedding_is_the_stock_pipelines(channels: int) -> None:
    w = torch.tensor([0.0, 2.0, 7.5, 14.0])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=channels)  # type: ignore[arg-type]
    torch.testing.assert_close(guidance_embedding(w, channels), theirs, rtol=1e-5, atol=1e-3)

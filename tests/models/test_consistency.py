"""Consistency maths against diffusers' schedulers and float64."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler
from torch import Tensor

from cdpo_ray.models.consistency import (
    boundary_scalings,
    clean_and_noise,
    consistency_function,
    ddim_step,
    grid_timesteps,
    guidance_embedding,
    guided,
    pseudo_huber,
)
from cdpo_ray.models.noising import PredictionType, add_noise

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GRID = torch.arange(19, 1000, 20)
PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction")


def lcm_scheduler(prediction_type: str = "epsilon") -> LCMScheduler:
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction_type)
    scheduler.set_timesteps(50)
    return scheduler


def draw(seed: int, count: int = len(GRID)) -> Tensor:
    return torch.randn(count, 4, 6, 5, generator=torch.Generator().manual_seed(seed))


ALPHA_BAR = lcm_scheduler().alphas_cumprod[GRID]


def test_the_grid_equals_the_schedulers_timesteps_for_50_steps() -> None:
    assert grid_timesteps().tolist() == lcm_scheduler().timesteps.tolist()[::-1] == GRID.tolist()


def test_scalings_equal_the_lcm_schedulers_at_all_timesteps() -> None:
    timesteps = torch.arange(1000)
    theirs = lcm_scheduler().get_scalings_for_boundary_condition_discrete(timesteps.double())
    for ours, expected in zip(boundary_scalings(timesteps), theirs, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    assert [scaling[0].item() for scaling in boundary_scalings(timesteps)] == [1.0, 0.0]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_an_exact_prediction_recovers_the_clean_latents_and_the_noise(prediction_type: PredictionType) -> None:
    latents, noise = draw(0), draw(1)
    noisy = add_noise(latents, noise, ALPHA_BAR)
    velocity = ALPHA_BAR.sqrt()[:, None, None, None] * noise - (1 - ALPHA_BAR).sqrt()[:, None, None, None] * latents
    prediction = noise if prediction_type == "epsilon" else velocity
    clean, found_noise = clean_and_noise(noisy, prediction, ALPHA_BAR, prediction_type)
    torch.testing.assert_close(clean, latents, rtol=0, atol=2e-5)
    torch.testing.assert_close(found_noise, noise, rtol=0, atol=2e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_a_step_of_20_timesteps_equals_ddims_at_every_grid_timestep(
    prediction_type: PredictionType, set_alpha_to_one: bool
) -> None:
    ddim = DDIMScheduler(
        **BETAS,
        prediction_type=prediction_type,
        set_alpha_to_one=set_alpha_to_one,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    ddim.set_timesteps(50)
    noisy, prediction = draw(0), draw(1)
    before = torch.cat([ddim.final_alpha_cumprod[None], ddim.alphas_cumprod[GRID[:-1]]])
    found = ddim_step(noisy, prediction, ALPHA_BAR, before, prediction_type)
    theirs = [ddim.step(prediction[i], int(GRID[i]), noisy[i], eta=0.0).prev_sample for i in range(len(GRID))]
    torch.testing.assert_close(found, torch.stack(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_consistency_function_equals_the_lcm_schedulers_denoised_sample(prediction_type: PredictionType) -> None:
    scheduler, noisy, prediction = lcm_scheduler(prediction_type), draw(0), draw(1)
    theirs = [scheduler.step(prediction[i], int(GRID[i]), noisy[i]).denoised for i in range(len(GRID))]
    clean, _ = clean_and_noise(noisy, prediction, ALPHA_BAR, prediction_type)
    torch.testing.assert_close(consistency_function(noisy, clean, GRID), torch.stack(theirs), rtol=1e-5, atol=1e-5)


def test_at_timestep_zero_the_consistency_function_is_the_identity_exactly() -> None:
    assert torch.equal(consistency_function(draw(0, 2), draw(1, 2), torch.zeros(2, dtype=torch.long)), draw(0, 2))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guiding_the_prediction_guides_the_clean_latents_and_the_noise(prediction_type: PredictionType) -> None:
    noisy, with_prompt, without_prompt = draw(0), draw(1), draw(2)
    guidance = torch.linspace(0, 15, len(GRID))
    found = clean_and_noise(noisy, guided(with_prompt, without_prompt, guidance), ALPHA_BAR, prediction_type)
    splits = [clean_and_noise(noisy, each, ALPHA_BAR, prediction_type) for each in (with_prompt, without_prompt)]
    scale = guidance.double()[:, None, None, None]
    for ours, a, b in zip(found, *splits, strict=True):
        torch.testing.assert_close(ours.double(), a.double() + scale * (a.double() - b.double()), rtol=1e-4, atol=1e-3)
    assert torch.equal(guided(with_prompt, without_prompt, torch.zeros(len(GRID))), with_prompt)


@pytest.mark.parametrize("num_channels", [256, 32])
def test_the_guidance_embedding_equals_the_pipelines(num_channels: int) -> None:
    guidance = torch.tensor([0.0, 1.0, 5.0, 7.5, 14.99])
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, guidance, num_channels)
    assert torch.equal(guidance_embedding(guidance, num_channels), theirs)


def test_pseudo_huber_equals_the_float64_mean_per_sample() -> None:
    prediction, target = draw(2), draw(3)
    difference = (prediction.double() - target.double()).numpy()
    exact = (np.hypot(difference, 0.001) - 0.001).reshape(len(GRID), -1).mean(axis=1)
    found = pseudo_huber(prediction, target)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-6)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_from_it() -> None:
    def distance(difference: float) -> float:
        return pseudo_huber(torch.full((1, 1, 1, 1), difference), torch.zeros(1, 1, 1, 1)).item()

    assert distance(0.0) == 0
    assert distance(0.001 * 4 / 3) == pytest.approx(0.001 * 2 / 3, rel=1e-3)  # sides 3, 4, 5
    assert distance(-5.0) == pytest.approx(5 - 0.001, rel=1e-6)
    assert distance(1e-4) == pytest.approx((math.sqrt(1.01) - 1) * 1e-3, rel=0.02)


def test_bfloat16_is_computed_in_fp32() -> None:
    noisy, prediction = draw(0).bfloat16(), draw(1).bfloat16()
    for prediction_type in PREDICTION_TYPES:
        found = clean_and_noise(noisy, prediction, ALPHA_BAR, prediction_type)
        expected = clean_and_noise(noisy.float(), prediction.float(), ALPHA_BAR, prediction_type)
        assert all(
            torch.equal(ours, exact) and ours.dtype == torch.float32
            for ours, exact in zip(found, expected, strict=True)
        )
    assert torch.equal(guided(noisy, prediction, GRID), guided(noisy.float(), prediction.float(), GRID))
    assert torch.equal(pseudo_huber(noisy, prediction), pseudo_huber(noisy.float(), prediction.float()))


def test_a_prediction_of_clean_latents_is_refused() -> None:
    with pytest.raises(ValueError, match="`prediction_type` must be 'epsilon' or 'v_prediction', got 'sample'"):
        clean_and_noise(draw(0), draw(1), ALPHA_BAR, "sample")  # type: ignore[arg-type]

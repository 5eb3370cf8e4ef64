"""Noising and errors against diffusers' scheduler and float64."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from cdpo_ray.models.noising import (
    add_noise,
    denoising_target,
    flow_interpolant,
    flow_velocity,
    squared_error,
)

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TIMESTEPS = torch.tensor([0, 1, 19, 250, 500, 750, 998, 999])
ALPHA_BAR = SCHEDULER.alphas_cumprod[TIMESTEPS]


def draw(seed: int) -> torch.Tensor:
    return torch.randn(len(TIMESTEPS), 4, 6, 5, generator=torch.Generator().manual_seed(seed))


def test_noisy_latents_equal_the_ddpm_schedulers() -> None:
    latents, noise = draw(0), draw(1)
    expected = SCHEDULER.add_noise(latents, noise, TIMESTEPS)
    torch.testing.assert_close(add_noise(latents, noise, ALPHA_BAR), expected, rtol=1e-6, atol=1e-6)


def test_the_velocity_target_equals_the_ddpm_schedulers() -> None:
    latents, noise = draw(0), draw(1)
    expected = SCHEDULER.get_velocity(latents, noise, TIMESTEPS)
    target = denoising_target(latents, noise, ALPHA_BAR, "v_prediction")
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_the_epsilon_target_is_the_noise() -> None:
    assert torch.equal(denoising_target(draw(0), draw(1), ALPHA_BAR, "epsilon"), draw(1))


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="`prediction_type` must be 'epsilon' or 'v_prediction', got 'sample'"):
        denoising_target(draw(0), draw(1), ALPHA_BAR, "sample")  # type: ignore[arg-type]


def test_half_precision_latents_are_noised_in_fp32_and_rounded_once() -> None:
    latents, noise = draw(0).bfloat16(), draw(1)
    noisy = add_noise(latents, noise, ALPHA_BAR)
    assert noisy.dtype == torch.bfloat16
    assert torch.equal(noisy, SCHEDULER.add_noise(latents.float(), noise, TIMESTEPS).bfloat16())
    assert denoising_target(latents, noise.bfloat16(), ALPHA_BAR, "epsilon").dtype == torch.float32


def test_the_error_equals_the_float64_mean_of_squares_per_sample() -> None:
    prediction, target = draw(2), draw(3)
    exact = ((prediction.numpy().astype(np.float64) - target.numpy().astype(np.float64)) ** 2).reshape(
        len(TIMESTEPS), -1
    )
    found = squared_error(prediction, target)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), exact.mean(axis=1), rtol=1e-6)


def test_half_precision_errors_are_computed_in_fp32() -> None:
    prediction, target = draw(2).half(), draw(3)
    assert torch.equal(squared_error(prediction, target), squared_error(prediction.float(), target))


def test_velocity_errors_equal_epsilon_errors_over_alpha_bar() -> None:
    latents, noise, guess = draw(0), draw(1), draw(4)
    signal, spread = ALPHA_BAR.sqrt()[:, None, None, None], (1 - ALPHA_BAR).sqrt()[:, None, None, None]
    noisy = add_noise(latents, noise, ALPHA_BAR)
    implied_latents = (noisy - spread * guess) / signal
    velocity = signal * guess - spread * implied_latents
    in_epsilon = squared_error(guess, denoising_target(latents, noise, ALPHA_BAR, "epsilon"))
    in_velocity = squared_error(velocity, denoising_target(latents, noise, ALPHA_BAR, "v_prediction"))
    torch.testing.assert_close(in_velocity, in_epsilon / ALPHA_BAR, rtol=1e-4, atol=0)


def test_interpolated_latents_equal_the_flow_matching_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    timesteps = scheduler.timesteps[[0, 1, 130, 500, 640, 998, 999]]
    latents, noise = draw(0)[:7], draw(1)[:7]
    expected = scheduler.scale_noise(latents, timesteps, noise)
    torch.testing.assert_close(flow_interpolant(latents, noise, timesteps / 1000), expected, rtol=1e-6, atol=1e-6)


def test_the_path_leads_from_latents_to_noise_and_its_derivative_is_the_velocity() -> None:
    latents, noise, ones = draw(0).double(), draw(1).double(), torch.ones(len(TIMESTEPS))
    assert torch.equal(flow_interpolant(latents, noise, 0 * ones), latents.float())
    assert torch.equal(flow_interpolant(latents, noise, ones), noise.float())
    early, late = flow_interpolant(latents, noise, 0.25 * ones), flow_interpolant(latents, noise, 0.75 * ones)
    torch.testing.assert_close(flow_velocity(latents, noise), (late - early) / 0.5, rtol=1e-5, atol=1e-5)


def test_half_precision_latents_are_interpolated_in_fp32() -> None:
    latents, noise, time = draw(0).bfloat16(), draw(1), torch.linspace(0, 1, len(TIMESTEPS))
    share = time.double()[:, None, None, None]
    expected = ((1 - share) * latents.double() + share * noise.double()).float()
    torch.testing.assert_close(flow_interpolant(latents, noise, time), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(flow_velocity(latents, noise), noise - latents.float())

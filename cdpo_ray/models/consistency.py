"""Predictions of a diffusion model -> target and error of the latent consistency model distilled from it."""

import functools

import torch
from torch import Tensor

from cdpo_ray.models.layouts import NUM_TIMESTEPS
from cdpo_ray.models.noising import PredictionType, add_noise, coefficients

GRID_STEP = 20
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
HUBER_WIDTH = 0.001


def grid_timesteps() -> Tensor:
    """The 50 timesteps 19, 39, ..., 999 at which a latent consistency model is distilled and sampled: ``[50]`` int64.

    Source: arXiv:2310.04378, section 4.3 (skipping k = 20 timesteps).
    """
    return torch.arange(GRID_STEP - 1, NUM_TIMESTEPS, GRID_STEP)


def clean_and_noise(
    noisy_latents: Tensor, prediction: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """Clean latents and noise that a prediction implies for noisy latents.

    Args:
        noisy_latents, prediction: ``[sample, channel, height, width]``.
        alpha_bar: ``[sample]`` fp32, at the timestep of ``noisy_latents``; > 0 for epsilon prediction.

    Returns:
        ``x0`` and ``eps``, fp32, such that ``sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps = noisy_latents``.

    Raises:
        ValueError: if the prediction type is neither epsilon nor v.

    Source: arXiv:2006.11239, equation 4 (epsilon); arXiv:2202.00512, section 4 (v).
    """
    signal, spread = coefficients(alpha_bar, noisy_latents)
    noisy_latents, prediction = noisy_latents.float(), prediction.float()
    if prediction_type == "epsilon":
        return (noisy_latents - spread * prediction) / signal, prediction
    if prediction_type == "v_prediction":
        return signal * noisy_latents - spread * prediction, signal * prediction + spread * noisy_latents
    raise ValueError(f"`prediction_type` must be 'epsilon' or 'v_prediction', got {prediction_type!r}")


def guided(with_prompt: Tensor, without_prompt: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance: ``a + w (a - b)`` of the predictions with and without the prompt.

    Clean latents and noise are affine in the prediction, so guiding it guides both. A pipeline's ``guidance_scale`` is
    ``w + 1``.

    Args:
        with_prompt, without_prompt: ``[sample, channel, height, width]``.
        guidance: ``w``, ``[sample]``; 0: no guidance.

    Returns:
        ``[sample, channel, height, width]`` fp32.

    Source: arXiv:2310.04378, equation 14; arXiv:2207.12598.
    """
    with_prompt, without_prompt = with_prompt.float(), without_prompt.float()
    return with_prompt + guidance.float()[:, None, None, None] * (with_prompt - without_prompt)


def ddim_step(
    noisy_latents: Tensor,
    prediction: Tensor,
    alpha_bar: Tensor,
    next_alpha_bar: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Deterministic DDIM step: clean latents and noise are mixed again at the next timestep.

    Args:
        next_alpha_bar: ``[sample]`` fp32, at the next timestep; other arguments as in `clean_and_noise`.

    Returns:
        ``[sample, channel, height, width]`` fp32.

    Source: arXiv:2010.02502, equation 12 with sigma = 0.
    """
    return add_noise(*clean_and_noise(noisy_latents, prediction, alpha_bar, prediction_type), next_alpha_bar)


def boundary_scalings(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """``c_skip = 0.25 / ((10 t)^2 + 0.25)`` and ``c_out = 10 t / sqrt((10 t)^2 + 0.25)``; 1 and 0 at ``t = 0``.

    Args:
        timestep: ``[sample]``, 0 to 999.

    Returns:
        ``c_skip`` and ``c_out``, ``[sample]`` fp32 each.

    Source: arXiv:2310.04378, section 4.1; the timestep scaling of 10 is the released code's.
    """
    scaled = timestep.float() * TIMESTEP_SCALING
    squared = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / squared, scaled / squared.sqrt()


def consistency_function(noisy_latents: Tensor, clean_latents: Tensor, timestep: Tensor) -> Tensor:
    """``f(z, t) = c_skip z + c_out x0``; the identity at ``t = 0``.

    Args:
        noisy_latents: ``z``, ``[sample, channel, height, width]``.
        clean_latents: ``x0`` that the denoiser predicts from ``z``, same shape.
        timestep: ``[sample]``, 0 to 999.

    Returns:
        ``[sample, channel, height, width]`` fp32.

    Source: arXiv:2310.04378, equation 9.
    """
    c_skip, c_out = (scaling[:, None, None, None] for scaling in boundary_scalings(timestep))
    return c_skip * noisy_latents.float() + c_out * clean_latents.float()


def guidance_embedding(guidance: Tensor, num_channels: int) -> Tensor:
    """Sinusoidal embedding of ``1000 w``, the input of a guidance-conditioned model.

    Args:
        guidance: ``w``, ``[sample]``.
        num_channels: size of the embedding, even; 256 in published models.

    Returns:
        ``[sample, num_channels]`` fp32.

    Source: arXiv:2310.04378, section 4.2; arXiv:1706.03762, section 3.5.
    """
    angles = (1000 * guidance.float())[:, None] * _frequencies(num_channels // 2, guidance.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@functools.lru_cache(maxsize=8)  # a copy from host memory in every forward pass would synchronise with the GPU
def _frequencies(count: int, device: torch.device) -> Tensor:
    step = torch.log(torch.tensor(10000.0)) / (count - 1)
    return torch.exp(torch.arange(count) * -step).to(device)


def pseudo_huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Pseudo-Huber distance: mean over channel, height and width of ``sqrt((a - b)^2 + c^2) - c``, ``c = 0.001``.

    Args:
        prediction, target: ``[sample, channel, height, width]``.

    Returns:
        ``[sample]`` fp32.

    Source: arXiv:2310.14189, section 3.3; elementwise, as in the released distillation code.
    """
    squares = (prediction.float() - target.float()) ** 2
    return torch.mean((squares + HUBER_WIDTH**2).sqrt() - HUBER_WIDTH, dim=(1, 2, 3))

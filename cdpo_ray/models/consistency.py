"""Noisy latents and a net's answer -> clean latents in one go: the maths of latent consistency models."""

import math

import torch
from torch import Tensor

from cdpo_ray.models.noising import PredictionType

GRID_STEP = 20
NUM_GRID_CELLS = 50
"""Consistency models are distilled on 50 of the 1000 timesteps: 19, 39, ..., 999."""

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
HUBER_WIDTH = 0.001


def clean_and_noise(
    noisy_latents: Tensor, output: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """What the net takes for the clean latents, and for the noise.

    Args:
        noisy_latents, output: ``[sample, channel, height, width]``; the net's answer is the noise, or v.
        alpha_bar: ``[sample]`` fp32.

    Returns:
        ``x0`` and ``eps``, ``[sample, channel, height, width]`` fp32.

    Source: arXiv:2006.11239 (epsilon), arXiv:2202.00512 (v).
    """
    signal, spread = (root[:, None, None, None] for root in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    noisy_latents, output = noisy_latents.float(), output.float()
    if prediction_type == "v_prediction":
        return signal * noisy_latents - spread * output, signal * output + spread * noisy_latents
    return (noisy_latents - spread * output) / signal, output


def guided(told: Tensor, untold: Tensor, guidance: Tensor) -> Tensor:
    """``told + w (told - untold)``: away from the answer without a prompt.

    Args:
        told, untold: ``[sample, channel, height, width]``, with and without the prompt.
        guidance: ``[sample]``, ``w``; a pipeline's ``guidance_scale`` is ``w + 1``.

    Source: arXiv:2207.12598; arXiv:2310.04378, equation 15.
    """
    return told + guidance[:, None, None, None] * (told - untold)


def ddim_step(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """``sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps``, at the timestep stepped to.

    Source: arXiv:2010.02502, equation 12, without noise of its own.
    """
    signal, spread = (root[:, None, None, None] for root in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    return signal * clean + spread * noise


def boundary_scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """``c_skip`` and ``c_out``, ``[sample]`` fp32: at timestep 0 they are 1 and 0, so that the latents stay.

    Source: arXiv:2310.04378, section 4.1; scaling and sigma as in the published model.
    """
    scaled = TIMESTEP_SCALING * timesteps.float()
    variance = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, scaled / variance.sqrt()


def consistency_function(noisy_latents: Tensor, clean: Tensor, timesteps: Tensor) -> Tensor:
    """``f(z, t) = c_skip z + c_out x0``, ``[sample, channel, height, width]`` fp32.

    Args:
        noisy_latents: at the timesteps.
        clean: what the net takes for the clean latents.
        timesteps: ``[sample]``.

    Source: arXiv:2310.04378, equation 9.
    """
    c_skip, c_out = (scale[:, None, None, None] for scale in boundary_scalings(timesteps))
    return c_skip * noisy_latents.float() + c_out * clean


def pseudo_huber(one: Tensor, other: Tensor) -> Tensor:
    """``sqrt((a - b)^2 + c^2) - c``, a mean over channel, height and width: ``[sample]`` fp32.

    Source: arXiv:2310.14189, section 3.3, a value at a time as in the released code.
    """
    squared = (one.float() - other.float()) ** 2
    return (torch.sqrt(squared + HUBER_WIDTH**2) - HUBER_WIDTH).mean(dim=(1, 2, 3))


def guidance_embedding(guidance: Tensor, channels: int) -> Tensor:
    """Sines and cosines of ``1000 w``: ``[sample]`` -> ``[sample, channels]`` fp32, for an even number of channels.

    Source: arXiv:2310.04378, section 4.2, after arXiv:1706.03762.
    """
    half = channels // 2
    steps = torch.arange(half, device=guidance.device, dtype=torch.float32)
    angles = 1000 * guidance.float()[:, None] * torch.exp(-math.log(10_000) / (half - 1) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)

"""Clean latents -> noisy latents and the denoiser's target."""

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """``sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps``, the forward process at each sample's timestep.

    Args:
        latents, noise: ``[sample, channel, height, width]``.
        alpha_bar: ``[sample]`` fp32, cumulative product of ``1 - beta_t`` at each sample's timestep.

    Returns:
        ``[sample, channel, height, width]`` in the dtype of ``latents``.

    Source: arXiv:2006.11239, equation 4.
    """
    signal, spread = coefficients(alpha_bar, latents)
    return (signal * latents.float() + spread * noise.float()).to(latents.dtype)


def denoising_target(latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: PredictionType) -> Tensor:
    """Target of the denoiser: the noise, or ``v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0``.

    Args:
        latents, noise, alpha_bar: as in `add_noise`.
        prediction_type: ``epsilon`` or ``v_prediction``.

    Returns:
        ``[sample, channel, height, width]`` fp32.

    Raises:
        ValueError: if ``prediction_type`` is any other.

    Source: arXiv:2006.11239 (epsilon); arXiv:2202.00512, section 4 (v).
    """
    if prediction_type == "epsilon":
        return noise.float()
    if prediction_type == "v_prediction":
        signal, spread = coefficients(alpha_bar, latents)
        return signal * noise.float() - spread * latents.float()
    raise ValueError(f"`prediction_type` must be 'epsilon' or 'v_prediction', got {prediction_type!r}")


def flow_interpolant(latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """``(1 - t) x0 + t eps``, the straight path of flow matching.

    Args:
        latents, noise: ``[sample, channel, height, width]``.
        time: ``[sample]`` fp32, 0 (data) to 1 (noise).

    Returns:
        ``[sample, channel, height, width]`` fp32.

    Source: arXiv:2403.03206, equation 13.
    """
    time = time.to(latents.device).float()[:, None, None, None]
    return (1 - time) * latents.float() + time * noise.float()


def flow_velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """``eps - x0``, the velocity along `flow_interpolant`'s path: ``[sample, channel, height, width]`` fp32."""
    return noise.float() - latents.float()


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference over channel, height and width: ``[sample]`` fp32."""
    return torch.mean((prediction.float() - target.float()) ** 2, dim=(1, 2, 3))


def coefficients(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """``sqrt(alpha_bar)`` and ``sqrt(1 - alpha_bar)``, ``[sample, 1, 1, 1]`` fp32 on the device of ``like``."""
    alpha_bar = alpha_bar.to(like.device).float()[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

"""Errors of the policy and of its reference on the same samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cdpo_ray.models.family import Conditioning, Times
from cdpo_ray.policy.policy import Policy


def sample_errors(
    policy: Policy, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Error of each sample under the policy and under the reference, on the same model inputs and target.

    Args:
        latents, noise: ``[sample, channel, height, width]``, on the model's device.
        conditioning, times: one row per sample.

    Returns:
        Policy errors ``[sample]`` fp32, which carry gradients; reference errors ``[sample]`` fp32, which do not; the
        policy's predictions that its errors come from, ``[sample, channel, height, width]``.
    """
    model = policy.model
    with torch.no_grad(), policy.reference(policy.net) as reference:
        task = model.denoising_task(reference, latents, conditioning, times, noise)
        reference_errors = model.errors(reference, task)
    prediction = model.predict(policy.net, task)
    prediction = prediction.view_as(prediction)  # a gradient at the engine's own output starts its backward pass
    return model.error(prediction, task.target), reference_errors, prediction


@torch.no_grad()
def error_changes(
    policy: Policy,
    latents: Tensor,
    conditioning: Conditioning,
    draws: Sequence[tuple[Times, Tensor]],
    *,
    samples_per_launch: int,
) -> Tensor:
    """Policy error minus reference error of each sample, by draw.

    In a 16-bit model the two nets round differently. This noise is independent between draws, so that averaging over
    draws reduces it like the variation between times and noises, which is several times larger (`docs/log.md`).

    Args:
        latents: ``[sample, channel, height, width]``.
        conditioning: one row per sample.
        draws: times and noise of each draw, one row per sample.
        samples_per_launch: number of samples per forward pass.

    Returns:
        ``[draw, sample]`` fp32, on the model's device.
    """
    model = policy.model
    changes = torch.zeros(len(draws), len(latents), device=model.device)
    for draw, (times, noise) in enumerate(draws):
        for start in range(0, len(latents), samples_per_launch):
            part = slice(start, start + samples_per_launch)
            policy_errors, reference_errors, _ = sample_errors(
                policy,
                latents[part].to(model.device, model.dtype),
                {name: value[part].to(model.device, model.dtype) for name, value in conditioning.items()},
                {name: value[part].to(model.device) for name, value in times.items()},
                noise[part].to(model.device),
            )
            changes[draw, part] = policy_errors - reference_errors
    return changes

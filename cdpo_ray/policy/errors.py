"""Errors of the policy and of its reference on the same samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cdpo_ray.models.family import Conditioning, Net, TextToImageModel, Times
from cdpo_ray.policy.policy import Reference


def sample_errors(
    model: TextToImageModel,
    policy: Net,
    reference: Reference,
    latents: Tensor,
    conditioning: Conditioning,
    times: Times,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Errors of each sample under the policy and under the reference, ``[sample]`` fp32 each: one task, both answer it.

    Args:
        policy: what is called to run the net: the net itself, or the engine around it.
        latents, noise: ``[sample, channel, height, width]``.
        conditioning, times: a row a sample.
    """
    with torch.no_grad(), reference(policy) as frozen:
        task = model.denoising_task(frozen, latents, conditioning, times, noise)
        reference_errors = model.errors(frozen, task)
    return model.errors(policy, task), reference_errors


@torch.no_grad()
def error_changes(
    model: TextToImageModel,
    policy: Net,
    reference: Reference,
    latents: Tensor,
    conditioning: Conditioning,
    draws: Sequence[tuple[Times, Tensor]],
    *,
    samples_per_launch: int,
) -> Tensor:
    """Policy error minus reference error of each sample, ``[sample]`` fp32, a mean over the draws.

    Args:
        policy, reference: as in `sample_errors`.
        latents: ``[sample, channel, height, width]``.
        conditioning: a row a sample.
        draws: times and noise of each draw, a row a sample.
        samples_per_launch: samples that go through the net at once.
    """
    changes = torch.zeros(len(latents), device=model.device)
    for times, noise in draws:
        for start in range(0, len(latents), samples_per_launch):
            part = slice(start, start + samples_per_launch)
            policy_errors, reference_errors = sample_errors(
                model,
                policy,
                reference,
                latents[part].to(model.device, model.dtype),
                {name: value[part].to(model.device, model.dtype) for name, value in conditioning.items()},
                {name: value[part].to(model.device) for name, value in times.items()},
                noise[part].to(model.device),
            )
            changes[part] += (policy_errors - reference_errors) / len(draws)
    return changes

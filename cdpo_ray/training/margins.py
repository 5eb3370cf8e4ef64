"""Policy -> what each sample is worth under it: difficulty measured anew at a stage's start."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.models.family import Conditioning, Net, TextToImageModel, Times, rows_of
from cdpo_ray.models.seeds import generator_at
from cdpo_ray.training.batches import SampleBank
from cdpo_ray.training.losses import kappa
from cdpo_ray.training.policy import Reference
from cdpo_ray.training.update import sample_errors


@torch.no_grad()
def sample_values(
    model: TextToImageModel,
    policy: Net,
    reference: Reference,
    bank: SampleBank,
    *,
    beta: float,
    num_draws: int,
    samples_per_launch: int,
    seed: int,
    stage: int,
    worker_rank: int,
    num_workers: int,
) -> NDArray[np.float32]:
    """``-beta/2 (policy error - reference error)`` of every sample, ``[prompt, sample]`` by row of the bank, in nats.

    All samples of a prompt see the same times and noise, a function of (seed, stage, prompt, draw), so the difference
    of two values is the mean margin of that pair over the draws. Each worker measures its share of the prompts; all get
    all values.

    Args:
        policy, reference: as in `update.sample_errors`.
        num_draws: times and noises a prompt, averaged over; more is less noisy.
        samples_per_launch: samples that go through the net at once.
    """
    num_prompts, num_samples = bank.latents.shape[:2]
    values = torch.zeros(num_prompts, num_samples, device=model.device)
    for first in range(0, num_prompts, num_workers):
        # Past the last prompt a worker measures that one again, for nothing: under ZeRO 3 all must launch alike.
        row = min(first + worker_rank, num_prompts - 1)
        asked = [
            draw_question(model, bank.latents.shape[2:], seed, "margin", stage, row, draw) for draw in range(num_draws)
        ]
        same = [0] * num_samples
        changes = error_changes(
            model,
            policy,
            reference,
            bank.latents[row],
            rows_of(bank.conditioning, [row] * num_samples),
            [(rows_of(times, same), noise[same]) for times, noise in asked],
            samples_per_launch=samples_per_launch,
        )
        if first + worker_rank < num_prompts:
            values[row] = -kappa(beta) * changes
    if num_workers > 1:
        torch.distributed.all_reduce(values)
    found: NDArray[np.float32] = values.cpu().numpy()
    return found


def draw_question(model: TextToImageModel, shape: tuple[int, ...], *address: int | str) -> tuple[Times, Tensor]:
    """One row of times and of noise ``[1, *shape]`` for samples that are to be compared: a function of the address."""
    generator = generator_at(*address)
    times = {name: value[None] for name, value in model.draw_times(generator).items()}
    return times, torch.randn(shape, generator=generator)[None]


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
        policy, reference: as in `update.sample_errors`.
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

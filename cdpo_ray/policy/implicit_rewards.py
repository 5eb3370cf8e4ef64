"""Policy -> implicit reward of each sample, up to a constant per prompt."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.models.family import Conditioning, Rows, TextToImageModel, Times, rows_of
from cdpo_ray.policy.errors import error_changes
from cdpo_ray.policy.policy import Policy
from cdpo_ray.randomness.noise import generator_at


@torch.no_grad()
def sample_values(
    policy: Policy,
    latents: Rows,
    conditioning: Mapping[str, Rows],
    *,
    num_prompts: int,
    kappa: float,
    num_draws: int,
    samples_per_launch: int,
    seed: int,
    stage: int,
    worker_rank: int,
    num_workers: int,
) -> NDArray[np.float32]:
    """``-kappa (policy error - reference error)`` of every sample, in nats, by draw.

    All samples of a prompt share times and noise, a function of (seed, stage, prompt, draw), so the difference of two
    values is that pair's margin. Each worker measures a share of the prompts; the values are then summed over workers,
    so every worker returns all of them.

    Args:
        latents: ``[prompt, sample, channel, height, width]``; indexed by one prompt at a time.
        conditioning: one row per prompt; indexed likewise.
        num_prompts: number of prompts to measure, from the first.
        num_draws: number of (times, noise) draws per prompt; the mean over more draws has less noise.
        samples_per_launch: number of samples per forward pass.

    Returns:
        ``[draw, prompt, sample]``.
    """
    model = policy.model
    num_samples = latents.shape[1]
    values = torch.zeros(num_draws, num_prompts, num_samples, device=model.device)
    for first in range(0, num_prompts, num_workers):
        # Past the last prompt a worker measures that one again and drops it: ZeRO 3 needs the same launches everywhere.
        row = min(first + worker_rank, num_prompts - 1)
        draws = [draw_noise(model, latents.shape[2:], seed, "margin", stage, row, draw) for draw in range(num_draws)]
        same = [0] * num_samples
        changes = error_changes(
            policy,
            latents[row],
            rows_of(conditioning, [row] * num_samples),
            [(rows_of(times, same), noise[same]) for times, noise in draws],
            samples_per_launch=samples_per_launch,
        )
        if first + worker_rank < num_prompts:
            values[:, row] = -kappa * changes
    if num_workers > 1:
        torch.distributed.all_reduce(values)
    found: NDArray[np.float32] = values.cpu().numpy()
    return found


def implicit_values(
    model: TextToImageModel,
    latents: Tensor,
    conditioning: Conditioning,
    prompts: Sequence[str],
    *,
    num_draws: int,
    samples_per_launch: int,
    seed: int,
) -> NDArray[np.float32]:
    """``-(error of the fine-tuned model - error of the base)`` of each sample, averaged over draws of times and noise.

    DPO's implicit reward up to a positive factor, which does not change the order. All samples of a prompt share times
    and noise, a function of (seed, prompt, draw), so their values are comparable. Leaves the model with `use_tuned` on.

    Args:
        model: model after `load_tuned`; must be loaded ``for_training`` if a teacher computes its target.
        latents: ``[sample, channel, height, width]``, scaled as the denoiser's input; of any images.
        conditioning: one row per sample.
        prompts: ``[sample]``, prompt texts, which address the draws.
        num_draws: number of (times, noise) draws to average over; more draws, less noise.
        samples_per_launch: number of samples per forward pass.

    Returns:
        ``[sample]``; higher: preferred by the fine-tuned model.

    Source: arXiv:2311.12908.
    """
    model.use_tuned(True)
    distinct = list(dict.fromkeys(prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    rows = [row_of[prompt] for prompt in prompts]
    draws = []
    for draw in range(num_draws):
        drawn = [draw_noise(model, latents.shape[1:], seed, "implicit", prompt, draw) for prompt in distinct]
        times = {name: torch.cat([times[name] for times, _ in drawn])[rows] for name in drawn[0][0]}
        draws.append((times, torch.cat([noise for _, noise in drawn])[rows]))
    policy = Policy(model, model.denoiser, model.base_of)
    changes = error_changes(policy, latents, conditioning, draws, samples_per_launch=samples_per_launch)
    return -changes.mean(dim=0).cpu().numpy()


def draw_noise(model: TextToImageModel, shape: tuple[int, ...], *address: int | str) -> tuple[Times, Tensor]:
    """Times, one row, and noise ``[1, *shape]`` shared by samples to compare: a function of the address."""
    generator = generator_at(*address)
    times = {name: value[None] for name, value in model.draw_times(generator).items()}
    return times, torch.randn(shape, generator=generator)[None]

"""Policy -> implicit reward of each sample, up to a constant of its prompt."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.models.family import Conditioning, Net, TextToImageModel, Times, rows_of
from cdpo_ray.policy.errors import error_changes
from cdpo_ray.policy.policy import Reference
from cdpo_ray.randomness.noise import generator_at


@torch.no_grad()
def sample_values(
    model: TextToImageModel,
    policy: Net,
    reference: Reference,
    latents: Tensor,
    conditioning: Conditioning,
    *,
    kappa: float,
    num_draws: int,
    samples_per_launch: int,
    seed: int,
    stage: int,
    worker_rank: int,
    num_workers: int,
) -> NDArray[np.float32]:
    """``-kappa (policy error - reference error)`` of every sample, ``[prompt, sample]``, in nats.

    All samples of a prompt see the same times and noise, a function of (seed, stage, prompt, draw), so the difference
    of two values is the mean margin of that pair over the draws. Each worker measures its share of the prompts; all get
    all values.

    Args:
        policy, reference: as in `errors.sample_errors`.
        latents: ``[prompt, sample, channel, height, width]``.
        conditioning: one row per prompt.
        num_draws: times and noises a prompt, averaged over; more is less noisy.
        samples_per_launch: samples that go through the net at once.
    """
    num_prompts, num_samples = latents.shape[:2]
    values = torch.zeros(num_prompts, num_samples, device=model.device)
    for first in range(0, num_prompts, num_workers):
        # Past the last prompt a worker measures that one again, for nothing: under ZeRO 3 all must launch alike.
        row = min(first + worker_rank, num_prompts - 1)
        asked = [draw_question(model, latents.shape[2:], seed, "margin", stage, row, draw) for draw in range(num_draws)]
        same = [0] * num_samples
        changes = error_changes(
            model,
            policy,
            reference,
            latents[row],
            rows_of(conditioning, [row] * num_samples),
            [(rows_of(times, same), noise[same]) for times, noise in asked],
            samples_per_launch=samples_per_launch,
        )
        if first + worker_rank < num_prompts:
            values[row] = -kappa * changes
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
    """``-(error of the fine-tuned model - error of the base)`` of each sample, a mean over draws of times and noise.

    DPO's implicit reward but for a positive factor, which changes no order. All samples of a prompt see the same times
    and noise, a function of (seed, prompt, draw), so that their values can be compared. The model is left with
    `use_tuned` on.

    Args:
        model: with what `load_tuned` added; one whose target a teacher makes must be loaded ``for_training``.
        latents: ``[sample, channel, height, width]``, scaled as the denoiser sees them; of images from anywhere.
        conditioning: a row a sample.
        prompts: ``[sample]``, the text of each; by it the draws are addressed.
        num_draws: more is less noisy.
        samples_per_launch: samples that go through the net at once.

    Returns:
        ``[sample]``; the more, the more the fine-tuned model favours it.

    Source: arXiv:2311.12908.
    """
    model.use_tuned(True)
    distinct = list(dict.fromkeys(prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    rows = [row_of[prompt] for prompt in prompts]
    draws = []
    for draw in range(num_draws):
        asked = [draw_question(model, latents.shape[1:], seed, "implicit", prompt, draw) for prompt in distinct]
        times = {name: torch.cat([times[name] for times, _ in asked])[rows] for name in asked[0][0]}
        draws.append((times, torch.cat([noise for _, noise in asked])[rows]))
    changes = error_changes(
        model,
        model.denoiser,
        model.base_of,
        latents,
        conditioning,
        draws,
        samples_per_launch=samples_per_launch,
    )
    return -changes.cpu().numpy()


def draw_question(model: TextToImageModel, shape: tuple[int, ...], *address: int | str) -> tuple[Times, Tensor]:
    """One row of times and of noise ``[1, *shape]`` for samples that are to be compared: a function of the address."""
    generator = generator_at(*address)
    times = {name: value[None] for name, value in model.draw_times(generator).items()}
    return times, torch.randn(shape, generator=generator)[None]

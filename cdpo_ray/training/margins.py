"""Policy -> what each sample is worth under it: difficulty measured anew at a stage's start."""

import numpy as np
import torch
from diffusers import ModelMixin
from numpy.typing import NDArray

from cdpo_ray.models.family import Net, TextToImageModel, rows_of
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
    denoiser: ModelMixin,
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
        policy, reference, denoiser: as in `update.sample_errors`.
        num_draws: times and noises a prompt, averaged over; more is less noisy.
        samples_per_launch: samples that go through the net at once.
    """
    num_prompts, num_samples = bank.latents.shape[:2]
    values = torch.zeros(num_prompts, num_samples, device=model.device)
    for first in range(0, num_prompts, num_workers):
        # Past the last prompt a worker measures that one again, for nothing: under ZeRO 3 all must launch alike.
        row = min(first + worker_rank, num_prompts - 1)
        counts = first + worker_rank < num_prompts
        for draw in range(num_draws):
            generator = generator_at(seed, "margin", stage, row, draw)
            times = {name: value[None].to(model.device) for name, value in model.draw_times(generator).items()}
            noise = torch.randn(bank.latents.shape[2:], generator=generator)[None].to(model.device)
            for start in range(0, num_samples, samples_per_launch):
                latents = bank.latents[row, start : start + samples_per_launch].to(model.device, model.dtype)
                same = [0] * len(latents)
                conditioning = {
                    name: value[[row] * len(latents)].to(model.device, model.dtype)
                    for name, value in bank.conditioning.items()
                }
                policy_errors, reference_errors = sample_errors(
                    model, policy, reference, denoiser, latents, conditioning, rows_of(times, same), noise[same]
                )
                if counts:
                    gain = -kappa(beta) * (policy_errors - reference_errors)
                    values[row, start : start + samples_per_launch] += gain / num_draws
    if num_workers > 1:
        torch.distributed.all_reduce(values)
    found: NDArray[np.float32] = values.cpu().numpy()
    return found

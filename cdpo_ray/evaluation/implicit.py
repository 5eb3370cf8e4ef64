"""Latents -> what the fine-tuned model holds of them: the reward that its preferences imply."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.models.family import Conditioning, TextToImageModel
from cdpo_ray.training.margins import draw_question, error_changes


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

"""Prompts masked to increasing degrees: images that are ranked without a judge."""

import torch
from torch import Tensor

from cdpo_ray.models.family import Conditioning
from cdpo_ray.randomness.noise import generator_at


def masked_shares(num_samples: int, max_masked_fraction: float, num_tokens: int) -> list[float]:
    """Masked share of the prompt for sample 0, 1, ...: from 0, the clean prompt, to the maximum, evenly spaced.

    Shares are rounded to whole positions: if there are more samples than positions, those with the same mask tie.

    Args:
        num_samples: number of samples of a prompt.
        max_masked_fraction: share for the last sample, 0 to 1.
        num_tokens: number of token positions.

    Source: arXiv:2602.13055 (increasing perturbation of prompts); the even spacing is our choice.
    """
    largest = max_masked_fraction * num_tokens
    return [round(largest * index / max(num_samples - 1, 1)) / num_tokens for index in range(num_samples)]


def masked_positions(num_tokens: int, share: float, *, seed: int, prompt: str) -> Tensor:
    """Masked token positions, ``[token]`` bool; those of a smaller share are a subset.

    The order of positions is a function of (seed, prompt).

    Args:
        share: share of the positions, 0 to 1, rounded to whole positions.
    """
    order = torch.randperm(num_tokens, generator=generator_at(seed, "perturbation", prompt))
    masked = torch.zeros(num_tokens, dtype=torch.bool)
    masked[order[: round(share * num_tokens)]] = True
    return masked


def perturbed(conditioning: Conditioning, empty: Conditioning, shares: list[float], masks: Tensor) -> Conditioning:
    """Replace masked positions by the empty prompt's, and interpolate pooled embeddings to the empty one's.

    Args:
        conditioning: one row per sample.
        empty: conditioning of the empty prompt, one row.
        shares: masked share of each sample, the weight of the interpolation.
        masks: ``[sample, token]`` bool.
    """
    embedding = conditioning["prompt_embedding"]
    masks = masks[:, :, None].to(embedding.device)
    mixed = {**conditioning, "prompt_embedding": torch.where(masks, empty["prompt_embedding"], embedding)}
    if "pooled_embedding" in conditioning:
        weights = torch.tensor(shares, device=embedding.device, dtype=embedding.dtype)[:, None]
        mixed["pooled_embedding"] = torch.lerp(
            conditioning["pooled_embedding"], empty["pooled_embedding"].to(embedding.dtype), weights
        )
    return mixed

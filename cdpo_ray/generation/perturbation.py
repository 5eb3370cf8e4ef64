"""Prompts -> ever more perturbed prompts: images that are ranked without a judge."""

import torch
from torch import Tensor

from cdpo_ray.models.family import Conditioning
from cdpo_ray.randomness.noise import generator_at


def masked_shares(num_samples: int, max_masked_fraction: float, num_tokens: int) -> list[float]:
    """Share of the prompt that is masked for sample 0, 1, ...: evenly from 0, the clean prompt, to the largest.

    Rounded to whole positions: where samples outnumber them, those with the same mask have the same share, a tie.

    Source: arXiv:2602.13055 (prompts perturbed to rising degrees); the even steps are chosen here.
    """
    largest = max_masked_fraction * num_tokens
    return [round(largest * index / max(num_samples - 1, 1)) / num_tokens for index in range(num_samples)]


def masked_positions(num_tokens: int, share: float, *, seed: int, prompt: str) -> Tensor:
    """Which token positions are masked, ``[token]`` bool: those of a smaller share, and more.

    The order in which positions fall is a function of (seed, prompt).

    Args:
        share: of the positions, 0 to 1, rounded to whole positions.
    """
    order = torch.randperm(num_tokens, generator=generator_at(seed, "perturbation", prompt))
    masked = torch.zeros(num_tokens, dtype=torch.bool)
    masked[order[: round(share * num_tokens)]] = True
    return masked


def perturbed(conditioning: Conditioning, empty: Conditioning, shares: list[float], masks: Tensor) -> Conditioning:
    """Masked positions say what the empty prompt says there; a pooled embedding moves to the empty one by the share.

    Args:
        conditioning: a row a sample.
        empty: one row, of the empty prompt.
        shares: of each sample.
        masks: ``[sample, token]`` bool.
    """
    told = conditioning["prompt_embedding"]
    mixed = {"prompt_embedding": torch.where(masks[:, :, None].to(told.device), empty["prompt_embedding"], told)}
    if "pooled_embedding" in conditioning:
        weights = torch.tensor(shares, device=told.device, dtype=told.dtype)[:, None]
        mixed["pooled_embedding"] = torch.lerp(
            conditioning["pooled_embedding"], empty["pooled_embedding"].to(told.dtype), weights
        )
    return mixed

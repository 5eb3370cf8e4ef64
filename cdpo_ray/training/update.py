"""Batch of pairs -> loss and metrics, by one forward pass of the policy and one of the reference."""

from collections.abc import Callable

import torch
from torch import Tensor

from cdpo_ray.policy.errors import sample_errors
from cdpo_ray.policy.policy import Policy
from cdpo_ray.training.batches import PairBatch

METRICS = (
    "loss",
    "margin",
    "implicit_accuracy",
    "policy_error_w",
    "policy_error_l",
    "reference_error_w",
    "reference_error_l",
)

PreferenceLoss = Callable[..., tuple[Tensor, Tensor]]
"""Policy and reference errors of chosen and rejected, four of ``[pair]`` -> loss and margin, ``[pair]`` each."""


def loss_of_pairs(policy: Policy, batch: PairBatch, *, preference_loss: PreferenceLoss) -> tuple[Tensor, Tensor]:
    """Mean loss of a batch and its `METRICS`; does not synchronise with the GPU.

    Chosen and rejected go through a net in one forward pass, with the same noise, times and conditioning.

    Args:
        batch: on the model's device, in its dtype.

    Returns:
        Scalar loss, which carries gradients; metrics ``[7]``, means over pairs, on the device.
    """
    policy_errors, reference_errors = sample_errors(
        policy,
        torch.cat([batch.latents_w, batch.latents_l]),
        {name: torch.cat([value, value]) for name, value in batch.conditioning.items()},
        {name: torch.cat([value, value]) for name, value in batch.times.items()},
        torch.cat([batch.noise, batch.noise]),
    )
    errors = (*policy_errors.chunk(2), *reference_errors.chunk(2))
    losses, margins = preference_loss(*errors)
    with torch.no_grad():
        columns = (losses, margins, (margins > 0).float(), *errors)
        metrics = torch.stack([column.mean() for column in columns])
    return losses.mean(), metrics

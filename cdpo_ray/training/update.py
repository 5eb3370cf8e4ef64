"""Batch of pairs -> loss and metrics, by one forward pass of the policy and one of the reference."""

from collections.abc import Callable

import torch
from torch import Tensor

from cdpo_ray.policy.errors import sample_errors
from cdpo_ray.policy.policy import Policy
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.losses import safe_scale

METRICS = (
    "loss",
    "margin",
    "implicit_accuracy",
    "policy_error_w",
    "policy_error_l",
    "reference_error_w",
    "reference_error_l",
    "error_change_w",
    "error_change_l",
)
"""Metrics of a launch; ``error_change``: the policy's error minus the reference's."""

PreferenceLoss = Callable[..., tuple[Tensor, Tensor]]
"""Policy and reference errors of chosen and rejected, four of ``[pair]`` -> loss and margin, ``[pair]`` each."""


def loss_of_pairs(
    policy: Policy, batch: PairBatch, *, preference_loss: PreferenceLoss, safeguard: float | None = None
) -> tuple[Tensor, Tensor]:
    """Mean loss of a batch and its `METRICS`; does not synchronise with the GPU.

    Chosen and rejected go through a net in one forward pass, with the same noise, times and conditioning.

    Args:
        batch: on the model's device, in its dtype.
        safeguard: scale the gradient that comes from each rejected image by `safe_scale`, with this ``kept``; values
            are unchanged. ``None``: gradient of the loss.

    Returns:
        Scalar loss, which carries gradients; metrics ``[9]``, means over pairs, on the device.
    """
    policy_errors, reference_errors, prediction = sample_errors(
        policy,
        torch.cat([batch.latents_w, batch.latents_l]),
        {name: torch.cat([value, value]) for name, value in batch.conditioning.items()},
        {name: torch.cat([value, value]) for name, value in batch.times.items()},
        torch.cat([batch.noise, batch.noise]),
    )
    errors = (*policy_errors.chunk(2), *reference_errors.chunk(2))
    losses, margins = preference_loss(*errors)
    loss = losses.mean()
    if safeguard is not None:
        (gradient,) = torch.autograd.grad(loss, prediction, retain_graph=True)  # not through the net
        scale = safe_scale(*gradient.chunk(2), kept=safeguard)
        policy_errors.register_hook(lambda slope: slope * torch.cat([torch.ones_like(scale), scale]))
    with torch.no_grad():
        error_w, error_l, reference_w, reference_l = errors
        changes = (error_w - reference_w, error_l - reference_l)
        columns = (losses, margins, (margins > 0).float(), *errors, *changes)
        metrics = torch.stack([column.mean() for column in columns])
    return loss, metrics

"""A batch of pairs -> one launch of the policy and one of the reference, forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from cdpo_ray.models.family import Net, TextToImageModel
from cdpo_ray.policy.errors import sample_errors
from cdpo_ray.policy.policy import Reference
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


def loss_of_pairs(
    model: TextToImageModel,
    policy: Net,
    reference: Reference,
    batch: PairBatch,
    *,
    preference_loss: PreferenceLoss,
) -> tuple[Tensor, Tensor]:
    """Mean loss of a batch, and its `METRICS` ``[7]`` as a tensor on the device: nothing waits for the GPU here.

    Chosen and rejected go through a net together, with the same noise, times and conditioning.

    Args:
        policy, reference: as in `sample_errors`.
        preference_loss: four errors -> loss and margin, ``[pair]`` each.
    """
    policy_errors, reference_errors = sample_errors(
        model,
        policy,
        reference,
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

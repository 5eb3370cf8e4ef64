"""A batch of pairs -> one launch of the policy and one of the reference, forward and backward."""

from collections.abc import Callable

import torch
from diffusers import ModelMixin
from peft.helpers import disable_input_dtype_casting
from torch import Tensor

from cdpo_ray.models.family import Net, TextToImageModel
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.policy import Reference

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


def pair_errors(
    model: TextToImageModel, policy: Net, reference: Reference, denoiser: ModelMixin, batch: PairBatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Errors ``[pair]`` fp32: the policy's of chosen and rejected, the reference's of chosen and rejected.

    Chosen and rejected go through a net together, with the same noise, times and conditioning.
    """
    mixed = torch.autocast(model.device, dtype=model.dtype, enabled=model.dtype != torch.float32)
    with mixed, disable_input_dtype_casting(denoiser):  # fp32 LoRA factors under autocast
        with torch.no_grad(), reference(policy) as frozen:
            task = model.denoising_task(
                frozen,
                torch.cat([batch.latents_w, batch.latents_l]),
                {name: torch.cat([value, value]) for name, value in batch.conditioning.items()},
                {name: torch.cat([value, value]) for name, value in batch.times.items()},
                torch.cat([batch.noise, batch.noise]),
            )
            reference_error_w, reference_error_l = model.errors(frozen, task).chunk(2)
        policy_error_w, policy_error_l = model.errors(policy, task).chunk(2)
    return policy_error_w, policy_error_l, reference_error_w, reference_error_l


def loss_of_pairs(
    model: TextToImageModel,
    policy: Net,
    reference: Reference,
    denoiser: ModelMixin,
    batch: PairBatch,
    *,
    preference_loss: PreferenceLoss,
) -> tuple[Tensor, Tensor]:
    """Mean loss of a batch, and its `METRICS` ``[7]`` as a tensor on the device: nothing waits for the GPU here.

    Args:
        policy: what is called to run the net: the net itself, or the engine around it.
        denoiser: the net.
        preference_loss: four errors -> loss and margin, ``[pair]`` each.
    """
    errors = pair_errors(model, policy, reference, denoiser, batch)
    losses, margins = preference_loss(*errors)
    with torch.no_grad():
        columns = (losses, margins, (margins > 0).float(), *errors)
        metrics = torch.stack([column.mean() for column in columns])
    return losses.mean(), metrics

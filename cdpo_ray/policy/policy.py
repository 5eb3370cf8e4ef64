"""Model -> what is trained and what it is measured against."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cdpo_ray.models.family import Net, TextToImageModel
from cdpo_ray.models.lora import (
    LORA_DIR,
    Adapters,
    attach_lora,
    continue_from,
    freeze_as_reference,
)
from cdpo_ray.models.lora_growth import LoraGrowth
from cdpo_ray.policy.job import LoraJob

Reference = Callable[[Net], AbstractContextManager[Net]]
"""Takes what is called to run the policy; within the block, what it gives is the frozen reference."""


@dataclass(frozen=True)
class Policy:
    """The net that learns, its trainable parameters, and the reference it is held to.

    Attributes:
        begin_stage: called with a stage, 1-based, before its first update; what learns may grow there.
    """

    trainable: list[nn.Parameter]
    reference: Reference
    begin_stage: Callable[[int], None] = lambda stage: None


def make_policy(
    model: TextToImageModel, lora: LoraJob | None, *, start_dir: Path | None, reference_is_start: bool, seed: int
) -> Policy:
    """Make the model's denoiser a policy, in place.

    Args:
        lora: the LoRA to train; none trains the whole net, and a frozen copy of it is the reference. One that goes on
            from an earlier round is full-grown already.
        start_dir: `4-training` of an earlier round to go on from; none starts from the base model.
        reference_is_start: hold the policy to what it started from, in place of the base model.
        seed: of the LoRA's first factor.
    """
    return (
        _lora_policy(model, lora, start_dir, reference_is_start, seed)
        if lora
        else _full_policy(model, start_dir, reference_is_start)
    )


def _lora_policy(
    model: TextToImageModel, lora: LoraJob, start_dir: Path | None, reference_is_start: bool, seed: int
) -> Policy:
    denoiser = model.denoiser
    trainable = attach_lora(denoiser, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed)
    if start_dir:
        continue_from(denoiser, model.denoiser_name, start_dir / LORA_DIR)
        if reference_is_start:
            freeze_as_reference(denoiser)
    adapters = Adapters(denoiser)
    frozen = adapters.reference_on if start_dir and reference_is_start else adapters.off

    @contextlib.contextmanager
    def reference(policy: Net) -> Iterator[Net]:
        with frozen():
            yield policy

    if start_dir or len(set(lora.capacities)) <= 1:
        return Policy(trainable, reference)
    growth = LoraGrowth(denoiser, from_output=lora.from_output)

    def begin_stage(stage: int) -> None:
        capacity = lora.capacities[stage - 1]
        growth.set_capacity(capacity.rank, capacity.block_share)

    return Policy(trainable, reference, begin_stage)


def _full_policy(model: TextToImageModel, start_dir: Path | None, reference_is_start: bool) -> Policy:
    base = model.denoiser
    if start_dir:
        model.load_tuned(start_dir)
        model.use_tuned(True)
    for net in (base, model.denoiser):  # DeepSpeed stores the policy so; one layout, the same kernels for both
        net.to(memory_format=torch.contiguous_format)
    frozen = base
    if reference_is_start or not start_dir:
        frozen = copy.deepcopy(model.denoiser)
        if model.compiled:
            frozen.compile()  # a copy of a compiled module is not compiled
    frozen.requires_grad_(False).eval()
    model.denoiser.requires_grad_(True)
    for parameter in model.denoiser.parameters():
        parameter.data = parameter.data.clone()  # aligned like the copy's, so that kernels and roundings are the same
    return Policy(list(model.denoiser.parameters()), lambda policy: contextlib.nullcontext(frozen))

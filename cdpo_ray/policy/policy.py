"""Model -> trainable policy and frozen reference."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from cdpo_ray.config.training import LoraSection
from cdpo_ray.curriculum.capacity import stage_capacities
from cdpo_ray.models.family import Net, TextToImageModel
from cdpo_ray.models.lora import (
    LORA_DIR,
    REFERENCE,
    Adapters,
    attach_lora,
    continue_from,
    freeze_as_reference,
)
from cdpo_ray.models.lora_growth import LoraGrowth
from cdpo_ray.models.lora_start import read_start, start_at

Reference = Callable[[Net], AbstractContextManager[Net]]
"""Policy's net -> context manager that yields the reference's: for a LoRA the same net, its adapter switched off."""


@dataclass(frozen=True)
class Policy:
    """Trainable net, its frozen reference, and the model that both belong to.

    Attributes:
        model: its denoiser is the policy's net.
        net: callable that runs the policy: the denoiser, or the engine around it.
        trainable: trainable parameters.
        begin_stage: called with a stage, 1-based, before its updates; a growing LoRA grows there.
    """

    model: TextToImageModel
    net: Net
    reference: Reference
    trainable: list[nn.Parameter] = field(default_factory=list)
    begin_stage: Callable[[int], None] = lambda stage: None


def make_policy(
    model: TextToImageModel,
    lora: LoraSection | None,
    *,
    num_stages: int = 1,
    start_from: str | None = None,
    start_dir: Path | None = None,
    reference: str = "base",
    seed: int = 0,
) -> Policy:
    """Make the model's denoiser trainable, in place.

    Args:
        lora: LoRA to train; ``None``: full fine-tuning, whose reference is a frozen copy of the net.
        num_stages: number of stages over which a growing LoRA grows; with ``start_dir`` it is fully grown at once.
        start_from: path of a LoRA to start from in the first round, see `read_start`.
        start_dir: path of an earlier round's `4-training`, to continue from; ``None``: the base model.
        reference: `training.reference`: ``base``, ``start`` or ``last_round``, the initial policy.
        seed: seed of the LoRA's first factor.

    Raises:
        ModelError: the LoRA in ``start_dir`` or ``start_from`` has other layers or another rank, or cannot be used.
        ValueError: the LoRA grows, but there is only one stage.
    """
    if lora:
        return _lora_policy(model, lora, num_stages, start_from, start_dir, reference, seed)
    return _full_policy(model, start_dir, reference)


def _lora_policy(
    model: TextToImageModel,
    lora: LoraSection,
    num_stages: int,
    start_from: str | None,
    start_dir: Path | None,
    reference: str,
    seed: int,
) -> Policy:
    denoiser = model.denoiser
    trainable = attach_lora(denoiser, **lora.layers, seed=seed)
    if start_from:
        start_at(
            denoiser,
            read_start(start_from, model.pipeline_class, model.denoiser_name, type(denoiser), denoiser.config, lora),
        )
    if reference == "start":
        freeze_as_reference(denoiser)
    if start_dir:
        continue_from(denoiser, model.denoiser_name, start_dir / LORA_DIR)
    if reference == "last_round" and (start_dir or start_from):
        freeze_as_reference(denoiser)
    adapters = Adapters(denoiser)
    frozen = adapters.reference_on if REFERENCE in denoiser.peft_config else adapters.off

    @contextlib.contextmanager
    def frozen_net(policy: Net) -> Iterator[Net]:
        with frozen():
            yield policy

    if start_dir or not lora.grows:
        return Policy(model, denoiser, frozen_net, trainable)
    capacities = stage_capacities(lora.rank, num_stages, **lora.growth)
    growth = LoraGrowth(denoiser, from_output=lora.unfreeze == "from_output")

    def begin_stage(stage: int) -> None:
        capacity = capacities[stage - 1]
        growth.set_capacity(capacity.rank, capacity.block_share)

    return Policy(model, denoiser, frozen_net, trainable, begin_stage)


def _full_policy(model: TextToImageModel, start_dir: Path | None, reference: str) -> Policy:
    base = model.denoiser
    if start_dir:
        model.load_tuned(start_dir)
        model.use_tuned(True)
    for net in (base, model.denoiser):  # DeepSpeed's layout; one layout for both, so the same kernels
        net.to(memory_format=torch.contiguous_format)
    frozen = base
    if reference == "last_round" or not start_dir:
        frozen = copy.deepcopy(model.denoiser)
        if model.compiled:
            frozen.compile()  # a copy of a compiled module is not compiled
    frozen.requires_grad_(False).eval()
    model.denoiser.requires_grad_(True)
    for parameter in model.denoiser.parameters():
        parameter.data = parameter.data.clone()  # aligned like the copy's, so that kernels and roundings are the same
    trainable = list(model.denoiser.parameters())
    return Policy(model, model.denoiser, lambda policy: contextlib.nullcontext(frozen), trainable)

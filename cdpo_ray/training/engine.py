"""Denoiser -> DeepSpeed engine, and its state -> checkpoint tensors and back."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no accelerator
import deepspeed
import deepspeed.ops
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from cdpo_ray.config.training import TrainingSection
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, save_lora
from cdpo_ray.training.adamw import MOMENTS, STEP, make_optimizer


def start_engine(
    denoiser: nn.Module, trainable: Sequence[nn.Parameter], training: TrainingSection, *, num_workers: int
) -> deepspeed.DeepSpeedEngine:
    """Engine around the denoiser; needs a process group.

    ZeRO stages 0 to 3 give the same update and differ in memory; a LoRA needs none. 16-bit trainable parameters (full
    fine-tuning; a LoRA's are fp32) get fp32 masters.

    Frozen weights keep their memory format. Trainable ones become contiguous, the layout of ZeRO's flat buffers.

    Args:
        training: ``pairs_per_launch`` and ``global_batch_size`` give the number of accumulation steps.
        num_workers: number of workers in the process group.

    Raises:
        TrainingError: the optimizer's package is not installed.
    """
    # DeepSpeed would probe all its compiled ops, then build a shared-memory all-reduce, which takes seconds and needs a
    # compiler on the workers. With an empty list it uses gloo or NCCL at once, with the same result.
    deepspeed.ops.__compatible_ops__ = {}
    logger.setLevel(logging.ERROR)  # else it warns of a subclass of AdamW, and of each skipped update
    optimizer = make_optimizer(trainable, training)
    config = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.pairs_per_launch,
        "gradient_accumulation_steps": training.global_batch_size // (training.pairs_per_launch * num_workers),
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,  # any class other than AdamW itself
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it synchronises with the device twice per update
    }
    if masters := trainable[0].dtype == torch.bfloat16:  # the configuration refuses to train float16 weights
        config["bf16"] = {"enabled": True}
    # Without masters and ZeRO, `step_and_measure` clips, with the norm that it has already. DeepSpeed's default is 1.
    config["gradient_clipping"] = training.max_grad_norm if masters or training.zero_stage else 0.0
    # Compared by strides, because a 1x1 kernel is contiguous in both memory formats.
    frozen = [(parameter, parameter.stride()) for parameter in denoiser.parameters() if not parameter.requires_grad]
    denoiser.to(memory_format=torch.contiguous_format)  # DeepSpeed broadcasts each parameter as a flat array of bytes
    optimizer.skips = not training.zero_stage  # with 16-bit parameters DeepSpeed steps once to create the state
    # DeepSpeed would take the device numbered LOCAL_RANK, which on nodes of more than 10 GPUs is not always Ray's.
    device = SimpleNamespace(device_rank=torch.cuda.current_device()) if torch.cuda.is_available() else None
    engine, *_ = deepspeed.initialize(args=device, model=denoiser, optimizer=optimizer, config=config)
    optimizer.skips = False
    if not engine.zero_optimization_partition_weights():  # ZeRO 3 gathers weights from flat shards
        for parameter, stride in frozen:
            if parameter.stride() != stride:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return engine


def limit_waiting(engine: deepspeed.DeepSpeedEngine, seconds: float) -> None:
    """Set the timeout of collectives, in both process groups of all workers.

    DeepSpeed has no option for the timeout of the group that it creates, which is half an hour.
    """
    world: Any = torch.distributed.group.WORLD  # typed as optional: `None` before initialisation
    for group in (world, engine.data_parallel_group):
        group.set_timeout(timedelta(seconds=seconds))


def training_tensors(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters in fp32, their moments and the step count, by name; independent of ZeRO stage and workers.

    Collective: under ZeRO each tensor is gathered as the iterator reaches it.
    """
    optimizer = engine.basic_optimizer
    if not optimizer.state:
        _make_state(engine, 0)
    for number, (name, parameter) in enumerate(_trainable(engine)):
        if engine.zero_optimization():
            yield name, safe_get_full_fp32_param(parameter)
            for moment in MOMENTS:
                yield f"{moment}.{name}", safe_get_full_optimizer_state(parameter, moment)
        else:
            master = optimizer.param_groups[0]["params"][number]
            yield name, master.detach()
            for moment, state in optimizer.saved_tensors(master).items():
                yield f"{moment}.{name}", state
    yield STEP, torch.tensor(optimizer.num_steps)


def restore_training(engine: deepspeed.DeepSpeedEngine, tensors: Callable[[str], Tensor]) -> None:
    """Restore the tensors of `training_tensors`, which may come from another ZeRO stage or number of workers.

    Args:
        tensors: function from a tensor's name to the tensor.
    """
    optimizer, sharded = engine.basic_optimizer, engine.zero_optimization_partition_weights()
    _make_state(engine, float(tensors(STEP)))
    for number, (name, parameter) in enumerate(_trainable(engine)):
        value = tensors(name).to(engine.device)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
            parameter.data.copy_(value)
        if engine.zero_optimization():
            safe_set_full_fp32_param(parameter, value)
            for moment in MOMENTS:
                safe_set_full_optimizer_state(parameter, tensors(f"{moment}.{name}").to(engine.device), moment)
        else:
            master = optimizer.param_groups[0]["params"][number]
            master.data.copy_(value)
            for moment, state in optimizer.saved_tensors(master).items():
                state.copy_(tensors(f"{moment}.{name}"))


def save_trained(engine: deepspeed.DeepSpeedEngine, model: TextToImageModel, folder: Path, *, lora: bool) -> None:
    """Write the LoRA, or the denoiser, in diffusers' format.

    Collective, because under ZeRO 3 each worker holds a shard; the first worker writes.
    """
    denoiser = engine.module
    trainable = [parameter for _, parameter in _trainable(engine)]
    with deepspeed.zero.GatheredParameters(trainable, enabled=engine.zero_optimization_partition_weights()):
        if torch.distributed.get_rank() > 0:
            return
        if lora:
            save_lora(model.pipeline_class, model.denoiser_name, denoiser, folder / LORA_DIR)
        else:
            denoiser.save_pretrained(folder / model.denoiser_name, safe_serialization=True)
            for path in (folder / model.denoiser_name).glob("*.safetensors"):
                path.chmod(0o644)


def _trainable(engine: deepspeed.DeepSpeedEngine) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _make_state(engine: deepspeed.DeepSpeedEngine, num_steps: float) -> None:
    """Create the optimizer state that its first step would create; existing moments are kept.

    Args:
        num_steps: number of steps already taken.
    """
    optimizer, sharded = engine.basic_optimizer, engine.zero_optimization_partition_weights()
    stepped = engine.optimizer.fp32_partitioned_groups_flat if sharded else optimizer.param_groups[0]["params"]
    for number, parameter in enumerate(stepped):
        optimizer.make_state(number, parameter, num_steps)
    if engine.zero_optimization() and not sharded:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # how ZeRO 1 and 2 find a parameter's moments

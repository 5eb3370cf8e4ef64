"""Denoiser -> DeepSpeed engine: the optimizer, ZeRO, and the state of both."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no other
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

MASTERS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Type of trainable parameters -> section of DeepSpeed's configuration that keeps fp32 copies of them."""


def start_engine(
    denoiser: nn.Module, trainable: Sequence[nn.Parameter], training: TrainingSection, *, num_workers: int
) -> deepspeed.DeepSpeedEngine:
    """An engine around the denoiser; a process group must be there.

    ZeRO follows memory: a LoRA needs none of it, but all of 0 to 3 give the same update. Trainable parameters of 16
    bits (a whole net's; a LoRA's are fp32) get fp32 masters.

    Frozen weights keep their memory format. Trainable ones are contiguous: ZeRO's flat buffers own their layout.
    """
    # DeepSpeed would probe every compiled operation it knows, then build a shared-memory all-reduce: seconds, and a
    # compiler on the workers' path. Told that there are none, it takes gloo or NCCL at once, with the same result.
    deepspeed.ops.__compatible_ops__ = {}
    logger.setLevel(logging.ERROR)  # it warns of a subclass of AdamW, and of each update that is skipped
    optimizer = make_optimizer(trainable, training)
    config = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.pairs_per_launch,
        "gradient_accumulation_steps": training.global_batch_size // (training.pairs_per_launch * num_workers),
        "zero_optimization": {"stage": training.zero_stage},
        "zero_allow_untested_optimizer": True,  # which it says of any class but AdamW itself
        "gradient_clipping": training.max_grad_norm,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice an update
    }
    if masters := MASTERS.get(trainable[0].dtype):
        config[masters] = {"enabled": True}
    # By strides, because a 1x1 kernel is contiguous in both memory formats.
    frozen = [(parameter, parameter.stride()) for parameter in denoiser.parameters() if not parameter.requires_grad]
    denoiser.to(memory_format=torch.contiguous_format)  # DeepSpeed broadcasts each parameter as a flat array of bytes
    optimizer.skips = not training.zero_stage  # around 16-bit parameters DeepSpeed steps once to make the state
    engine, *_ = deepspeed.initialize(model=denoiser, optimizer=optimizer, config=config)
    optimizer.skips = False
    if not engine.zero_optimization_partition_weights():  # ZeRO 3 gathers weights from flat shards
        for parameter, stride in frozen:
            if parameter.stride() != stride:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return engine


def limit_waiting(engine: deepspeed.DeepSpeedEngine, seconds: float) -> None:
    """Limit how long a collective waits for a worker that does not come, in both groups of all workers.

    DeepSpeed takes no timeout for the group that it makes; its collectives would wait for half an hour.
    """
    world: Any = torch.distributed.group.WORLD  # None in its type: before a group is there
    for group in (world, engine.data_parallel_group):
        group.set_timeout(timedelta(seconds=seconds))


def training_tensors(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[str, Tensor]]:
    """Every trainable parameter in fp32, whole, and its two moments, by name: what ZeRO stage and workers share.

    All workers must go through it together: under ZeRO each tensor is put together as it is asked for.
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
    """Put back what `training_tensors` gave, under whatever ZeRO stage and number of workers.

    Args:
        tensors: by name.
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
    """Write what was trained, whole, as diffusers loads it: the LoRA, or the denoiser.

    Every worker takes part (under ZeRO 3 each holds a share), the first writes.
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
    """What the optimizer's first step would make, as if so many had been taken; moments that are there stay."""
    optimizer, sharded = engine.basic_optimizer, engine.zero_optimization_partition_weights()
    stepped = engine.optimizer.fp32_partitioned_groups_flat if sharded else optimizer.param_groups[0]["params"]
    for number, parameter in enumerate(stepped):
        optimizer.make_state(number, parameter, num_steps)
    if engine.zero_optimization() and not sharded:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # how ZeRO 1 and 2 find a parameter's moments

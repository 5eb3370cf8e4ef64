"""Denoiser -> DeepSpeed engine: the optimizer, ZeRO, and checkpoints of both."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

os.environ.setdefault("DS_LOG_LEVEL", "ERROR")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no other
import deepspeed
import deepspeed.ops

from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, save_lora
from cdpo_ray.training.job import Optimization

TAG = "training"
MASTERS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Type of trainable parameters -> section of DeepSpeed's configuration that keeps fp32 copies of them."""


def start_engine(
    denoiser: nn.Module, trainable: Sequence[nn.Parameter], optimization: Optimization, *, num_workers: int
) -> deepspeed.DeepSpeedEngine:
    """An engine around the denoiser; a process group must be there.

    ZeRO follows memory: a LoRA needs none of it, but all of 0 to 3 give the same update. Trainable parameters of 16
    bits (a whole net's; a LoRA's are fp32) get fp32 masters.
    """
    # DeepSpeed would probe every compiled operation it knows, then build a shared-memory all-reduce: seconds, and a
    # compiler on the workers' path. Told that there are none, it takes gloo or NCCL at once, with the same result.
    deepspeed.ops.__compatible_ops__ = {}
    adam = {
        "lr": optimization.learning_rate,
        "betas": [optimization.adam_beta1, optimization.adam_beta2],
        "weight_decay": optimization.weight_decay,
        "torch_adam": True,
    }
    config = {
        "train_batch_size": optimization.global_batch_size,
        "train_micro_batch_size_per_gpu": optimization.pairs_per_launch,
        "gradient_accumulation_steps": optimization.global_batch_size // (optimization.pairs_per_launch * num_workers),
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": optimization.zero_stage},
        "gradient_clipping": optimization.max_grad_norm,
        "steps_per_print": 2**31,
    }
    if masters := MASTERS.get(trainable[0].dtype):
        config[masters] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=denoiser, model_parameters=list(trainable), config=config)
    return engine


def save_training(engine: deepspeed.DeepSpeedEngine, folder: Path, state: dict[str, Any]) -> None:
    """Every worker writes its share of the optimizer, and what was trained, to its own folder."""
    engine.save_checkpoint(str(folder), tag=TAG, client_state=state, exclude_frozen_parameters=True)


def load_training(engine: deepspeed.DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Take up training where `save_training` left it; returns the state given there."""
    path, state = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
    assert path is not None, f"no checkpoint in {folder}"
    result: dict[str, Any] = state
    return result


def save_trained(engine: deepspeed.DeepSpeedEngine, model: TextToImageModel, folder: Path, *, lora: bool) -> None:
    """Write what was trained, whole, as diffusers loads it: the LoRA, or the denoiser.

    Every worker takes part (under ZeRO 3 each holds a share), the first writes.
    """
    denoiser = engine.module
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    with deepspeed.zero.GatheredParameters(trainable, enabled=engine.zero_optimization_partition_weights()):
        if torch.distributed.get_rank() > 0:
            return
        if lora:
            save_lora(model.pipeline_class, model.denoiser_name, denoiser, folder / LORA_DIR)
        else:
            denoiser.save_pretrained(folder / model.denoiser_name, safe_serialization=True)
            for path in (folder / model.denoiser_name).glob("*.safetensors"):
                path.chmod(0o644)

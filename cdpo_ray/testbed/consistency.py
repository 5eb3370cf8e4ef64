"""Folders of the tiny consistency model and its teacher -> diffusers' latent consistency pipeline."""

from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel

from cdpo_ray.testbed import CONSISTENCY_DIR, PIPELINE_DIR


def load_consistency_pipeline(
    dtype: torch.dtype = torch.float32, *, pipeline_dir: Path = PIPELINE_DIR, consistency_dir: Path = CONSISTENCY_DIR
) -> LatentConsistencyModelPipeline:
    """Load the consistency model on the CPU, from safetensors only.

    Args:
        dtype: dtype of the weights.
        pipeline_dir: folder of the autoencoder, the text encoder and its tokenizer; its UNet was the teacher.
        consistency_dir: folder of the UNet and the scheduler.
    """
    unet = UNet2DConditionModel.from_pretrained(consistency_dir / "unet", dtype=dtype, use_safetensors=True)
    scheduler = LCMScheduler.from_pretrained(consistency_dir / "scheduler")
    return LatentConsistencyModelPipeline.from_pretrained(
        pipeline_dir, unet=unet, scheduler=scheduler, dtype=dtype, use_safetensors=True
    )

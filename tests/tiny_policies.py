"""Tiny models set up as in a training worker, their config section, and pairs to train on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cdpo_ray.config.training import LoraSection, TrainingSection
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel, rows_of
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.randomness.noise import generator_at, noise_at
from cdpo_ray.training.batches import PairBatch

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TinyModels = Callable[[str], Path]


def load(folder: Path, family: str, **options: Any) -> TextToImageModel:
    return load_model(family.removesuffix("_schnell"), path=str(folder), device="cpu", **options)


def start(
    folder: Path, family: str = "stable_diffusion", *, dtype: str = "float32", compiled: bool = False
) -> tuple[TextToImageModel, Policy]:
    """Model and policy as in a training worker."""
    model = load(folder, family, dtype=dtype, compile=compiled, for_training=True)
    policy = make_policy(model, LoraSection(rank=4, alpha=8, targets=TARGETS))
    model.denoiser.train()
    return model, policy


def training_section(**keys: Any) -> TrainingSection:
    """Section with these keys; the required ones have values."""
    return TrainingSection(**{"beta": 500, "learning_rate": 1e-3, "global_batch_size": 4} | keys)


def make_pairs(model: TextToImageModel, count: int = 4) -> PairBatch:
    conditioning, _ = model.encode_prompts([f"prompt {number}" for number in range(count)])
    shape = (count, *model.latent_shape(64, 64))
    times = [model.draw_times(generator_at(0, "times", number)) for number in range(count)]
    batch = PairBatch(
        noise_at(shape, 0, "chosen"),
        noise_at(shape, 0, "rejected"),
        conditioning,
        {name: torch.stack([drawn[name] for drawn in times]) for name in times[0]},
        noise_at(shape, 0, "noise"),
    )
    return batch.to("cpu", model.dtype)


def pairs_at(batch: PairBatch, rows: slice) -> PairBatch:
    """The pairs at some rows of a batch."""
    return PairBatch(
        batch.latents_w[rows],
        batch.latents_l[rows],
        rows_of(batch.conditioning, rows),
        rows_of(batch.times, rows),
        batch.noise[rows],
    )

"""Scenes -> pool of training images in memory."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdpo_ray.testbed.scenes import Scene, render, sample_scene


@dataclass(frozen=True)
class Pool:
    """Scenes of the train split and their renders."""

    scenes: list[Scene]
    images: Tensor  # [scene, 3, 32, 32] uint8

    def pixels(self, index: Tensor) -> Tensor:
        """``[index, 3, 32, 32]`` fp32 in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1


def draw_pool(num_scenes: int, seed: int) -> Pool:
    """Draw scenes of the train split only; equal seeds give equal pools."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(num_scenes)]
    return Pool(scenes, torch.from_numpy(np.stack([render(scene, rng) for scene in scenes])))


def cosine_schedule(
    optimizer: torch.optim.Optimizer, num_updates: int, num_warmup_updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a cosine down to zero at ``num_updates``."""
    warmup = min(num_warmup_updates, max(1, num_updates // 10))
    return torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_updates - warmup)),
        ],
        milestones=[warmup],
    )

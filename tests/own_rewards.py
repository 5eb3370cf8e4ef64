"""Rewards of a user, valid and faulty."""

import json
import os
import time
from collections.abc import Sequence

import numpy as np
import ray
from torch import Tensor


def same(images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    return np.zeros(len(prompts))


def broken(images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    raise KeyError("no such thing")


def noisy(images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    """Brightness with random noise of a thousandth of the scale."""
    return images.double().mean(dim=(1, 2, 3)).numpy() / 255 + np.random.default_rng().normal(0, 1e-3, len(prompts))


def sometimes_missing(images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    """The first image of each prompt has no score."""
    scores = images.float().mean(dim=(1, 2, 3)).numpy().astype(float)
    scores[::4] = np.nan
    return scores


def slow_and_logged(images: Tensor, prompts: Sequence[str]) -> np.ndarray:
    """Brightness; each call is slow, and logs its process, node and prompts in one line."""
    line = {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id(), "prompts": sorted(set(prompts))}
    with open(os.environ["OWN_REWARDS_LOG"], "a") as log:
        log.write(f"{json.dumps(line)}\n")
    time.sleep(0.5)
    return images.double().mean(dim=(1, 2, 3)).numpy()

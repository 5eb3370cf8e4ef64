"""Processes of training workers without Ray: forked from a server that has imported what they need, once for all."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

PRELOADED = [
    "cdpo_ray.training.worker",
    "cdpo_ray.models.stable_diffusion",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "transformers.models.clip.modeling_clip",
]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(PRELOADED)  # read when the first process is started


def run_workers(work: Callable[..., Any], *arguments: Any, num_workers: int) -> None:
    """Call ``work(rank, *arguments)`` in a process per worker, and wait for all of them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a worker raised.
    """
    torch.multiprocessing.start_processes(  # type: ignore[attr-defined]
        work, arguments, nprocs=num_workers, start_method="forkserver"
    )

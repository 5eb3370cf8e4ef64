"""Process group of a single process, for DeepSpeed without Ray or a launcher."""

import os

import torch


def form_group_alone(device: str) -> None:
    """Initialise a process group that consists of this process."""
    os.environ.setdefault("LOCAL_RANK", "0")
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)

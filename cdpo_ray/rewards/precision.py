"""Floating-point precision of the judges' nets."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def net_precision(device: str) -> Iterator[None]:
    """Within the block, matrix products run in TF32 on CUDA, and in fp32 elsewhere.

    The setting belongs to the whole process and is restored at the end: what else runs there keeps its precision. bf16
    does not order the images of a prompt as fp32 does, see `docs/log.md`.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # convolutions use TF32 by PyTorch's default
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before

"""Floating-point precision of the judges."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def net_precision(device: str) -> Iterator[None]:
    """Context manager in which matrix products run in TF32 on CUDA, and in fp32 elsewhere.

    The setting is process-wide and restored on exit, so that other models keep their precision. bf16 does not preserve
    fp32's order of the images of a prompt, see `docs/log.md`.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # convolutions use TF32 by default
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before

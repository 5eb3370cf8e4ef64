"""The floating-point precision in which judges run their nets: decided here for all of them."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def net_precision(device: str) -> Iterator[None]:
    """Context to run a judge's net in: matrix products in TF32 on CUDA, elsewhere fp32 as ever.

    TF32 is a switch of the whole process: it is put back at the end, so that a training in the same process keeps its
    precision. bf16 does not order the images of a prompt as fp32 does, see `docs/log.md`.
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

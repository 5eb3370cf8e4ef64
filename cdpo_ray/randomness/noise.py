"""Torch generators and noise by address."""

import torch
from torch import Tensor

from cdpo_ray.randomness.numbers import seed_of


def generator_at(*address: int | str) -> torch.Generator:
    """CPU generator of an address; on the CPU, so that the numbers do not depend on the device."""
    return torch.Generator().manual_seed(seed_of(*address))


def noise_at(shape: tuple[int, ...], *address: int | str) -> Tensor:
    """Standard normal noise of ``shape``, fp32."""
    return torch.randn(shape, generator=generator_at(*address))

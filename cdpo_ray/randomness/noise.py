"""Address -> generators and noise of torch."""

import torch
from torch import Tensor

from cdpo_ray.randomness.numbers import seed_of


def generator_at(*address: int | str) -> torch.Generator:
    """A CPU generator at an address; CPU, so that every device starts from the same numbers."""
    return torch.Generator().manual_seed(seed_of(*address))


def noise_at(shape: tuple[int, ...], *address: int | str) -> Tensor:
    """Standard normal noise of ``shape``, fp32."""
    return torch.randn(shape, generator=generator_at(*address))

"""Torch generators and noise by address."""

import numpy as np
import torch
from torch import Tensor

from cdpo_ray.randomness.numbers import key_of

NUM_STATE_WORDS = 624
"""Size of the state of the Mersenne Twister, torch's generator on the CPU, in 32-bit words."""
STATE_OFFSET = 24
"""Bytes of a generator's state before these words, which are stored as 64-bit numbers."""


def generator_at(*address: int | str) -> torch.Generator:
    """CPU generator of an address; on the CPU, so that the numbers do not depend on the device.

    Its whole state is a Philox stream with the address's 128-bit key. `torch.Generator.manual_seed` uses only 32 bits
    of a seed, so that among 100,000 addresses two would be likely to share their noise.
    """
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    words = state.numpy()[STATE_OFFSET : STATE_OFFSET + 8 * NUM_STATE_WORDS].view(np.uint64)
    words[:] = np.random.Philox(key=key_of(*address)).random_raw(NUM_STATE_WORDS) >> np.uint64(32)
    return generator.set_state(state)


def noise_at(shape: tuple[int, ...], *address: int | str) -> Tensor:
    """Standard normal noise of ``shape``, fp32."""
    return torch.randn(shape, generator=generator_at(*address))

"""AdamW with 8-bit moments, by bitsandbytes, an optional package."""

from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit
from torch import Tensor

from cdpo_ray.training.adamw import STEP, Skipping


class StreamedAdamW8bit(AdamW8bit):
    """bitsandbytes' AdamW without synchronisation: its own step waits for the device after every tensor.

    Its kernels run on the device's default stream, which training uses too, so they stay ordered with it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        for number, parameter in enumerate(group["params"]):
            if parameter.grad is not None:
                if not self.state[parameter]:
                    self.init_state(group, parameter, 0, number)
                self.update_step(group, parameter, 0, number)


class SkippingAdamW8bit(Skipping, StreamedAdamW8bit):
    """Moments as 8-bit codes, with one scale per block of 256; fp32 for tensors of fewer than 4096 values.

    Checkpoints store codes and scales. Dequantised moments would not restore them exactly: the signed map has a code
    for +1 but none for -1, so quantising again changes blocks whose largest absolute value is negative.

    Source: arXiv:2110.02861.
    """

    saved_state = ("state1", "state2", "absmax1", "absmax2")

    def make_state(self, number: int, parameter: Tensor, num_steps: float) -> None:
        if not self.state[parameter]:
            self.init_state(self.param_groups[0], parameter, 0, number)
        self.state[parameter][STEP] = int(num_steps)

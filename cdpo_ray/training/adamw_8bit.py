"""AdamW with 8-bit moments, by bitsandbytes; imported when a configuration asks for it."""

from bitsandbytes.optim.adamw import AdamW8bit
from torch import Tensor

from cdpo_ray.training.adamw import STEP, Skipping


class SkippingAdamW8bit(Skipping, AdamW8bit):  # type: ignore[misc]
    """Moments as codes of 8 bits in blocks of 256 with a scale each; of tensors below 4096 values, fp32.

    A checkpoint holds codes and scales as they are. Dequantised moments would not do: the signed map has a code for +1
    but none for -1, so that quantising them again changes blocks whose largest value is negative.

    Source: arXiv:2110.02861.
    """

    saved_state = ("state1", "state2", "absmax1", "absmax2")

    def make_state(self, number: int, parameter: Tensor, num_steps: float) -> None:
        if not self.state[parameter]:
            self.init_state(self.param_groups[0], parameter, 0, number)
        self.state[parameter][STEP] = int(num_steps)

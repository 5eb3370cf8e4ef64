"""LoRA -> a LoRA of which a part learns: it grows by letting more of it learn."""

import math
from fractions import Fraction
from functools import partial

from diffusers import ModelMixin
from torch import Tensor, nn

from cdpo_ray.models.lora import POLICY

BEHIND_THE_MIDDLE = ("up_blocks", "conv_out")


class LoraGrowth:
    """Holds back the gradient of the part of a fresh LoRA that is not to learn yet.

    Only columns of second factors are held back. As they start at zero, they stay there, add nothing to the output, and
    leave their rows of the first factors without gradient: what learns is a LoRA of smaller rank, in fewer layers, at
    the same ``alpha / rank``. Letting more of it learn changes neither the output nor any tensor's shape, so that
    optimizer, checkpoints and compiled nets see nothing of it; a new column's Adam moments are zero, as if padded.

    Rows of first factors that wait shrink by ``learning_rate * weight_decay`` an update, as all do: below one part in
    ten million of their start in a published update (1e-4 each), which fp32 rounds to nothing.

    Args:
        denoiser: with a LoRA attached, not trained yet.
        from_output: blocks begin to learn in the order from output to input, else from input to output.

    Source: arXiv:2602.13055; new columns zero and the optimizer's state kept are the paper's, the order is a choice.
    """

    def __init__(self, denoiser: ModelMixin, *, from_output: bool = False) -> None:
        blocks = second_factors(denoiser)
        if from_output:
            blocks.reverse()
        self.ranks = [0] * len(blocks)
        for number, factors in enumerate(blocks):
            for factor in factors:
                factor.register_hook(partial(self._hold_back, number))

    def let_learn(self, rank: int, block_share: Fraction) -> None:
        """From now on the first ``rank`` columns learn, in the first ``block_share`` of the blocks, rounded up."""
        num_blocks = math.ceil(block_share * len(self.ranks))
        self.ranks = [rank if number < num_blocks else 0 for number in range(len(self.ranks))]

    def _hold_back(self, block: int, gradient: Tensor) -> Tensor:
        held = gradient.clone()
        held[:, self.ranks[block] :] = 0
        return held


def second_factors(denoiser: ModelMixin) -> list[list[nn.Parameter]]:
    """Second factors of the LoRA's layers, ``[out, rank, ...]`` each, by block, from the net's input to its output.

    A block is what a net holds in a numbered list (``down_blocks.0``, ``transformer_blocks.11``); a layer outside of
    such lists is a block of its own.
    """
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in denoiser.named_parameters():
        if f".lora_B.{POLICY}." in name:
            blocks.setdefault(_block_of(name), []).append(parameter)
    in_order = sorted(blocks, key=lambda name: name.startswith(BEHIND_THE_MIDDLE))  # UNets register their middle last
    return [blocks[name] for name in in_order]


def _block_of(name: str) -> str:
    parts = name.split(".lora_B.")[0].split(".")
    numbers = (place for place, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: next(numbers, len(parts)) + 1])

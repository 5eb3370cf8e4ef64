"""LoRA whose trainable rank and blocks grow during training, by masked gradients."""

import math
from fractions import Fraction
from functools import partial

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from cdpo_ray.models.lora import MAGNITUDE, POLICY

AFTER_BLOCKS = ("up_blocks", "conv_out", "all_final_layer")


class LoraGrowth:
    """Masks the gradient of the part of a new LoRA that is not trained yet.

    Only columns of second factors are masked. They start at zero and stay zero, add nothing to the output, and leave
    their rows of the first factors without gradient: the trained part is a LoRA of smaller rank, in fewer layers, with
    the same scale. Raising the capacity changes neither the output nor any tensor's shape, so optimizer,
    checkpoints and compiled models are not affected. Magnitudes of a DoRA are trained in the blocks that are.

    Adam's moments of a new column are zero, as if padded, but its step count is that of the whole LoRA. So the bias
    correction of a new parameter is missing: for a constant gradient, step ``n`` of a column that is new after ``t``
    updates is ``(1 - beta1^n) sqrt((1 - beta2^(t + n)) / (1 - beta2^n))`` times the learning rate, with the default
    betas at most 3.8 times for ``t`` = 400 and 6.1 times for ``t`` = 2,000.

    Masked rows of first factors decay by ``learning_rate * weight_decay`` per update, as all rows do: at most 1e-8 with
    the published 1e-4 each, which fp32 rounds to zero.

    Args:
        denoiser: with a LoRA attached, not trained yet.
        from_output: whether blocks start to train in order from output to input, or from input to output.

    Source: arXiv:2602.13055 (new columns zero, optimizer state kept); the order of blocks is our choice.
    """

    def __init__(self, denoiser: ModelMixin, *, from_output: bool = False) -> None:
        blocks, magnitudes = by_block(denoiser, "lora_B"), by_block(denoiser, MAGNITUDE)
        self.ranks = [0] * len(blocks)
        for parts, mask in ((blocks, self._mask), (magnitudes, self._mask_whole)):
            for number, parameters in enumerate(reversed(parts) if from_output else parts):
                for parameter in parameters:
                    parameter.register_hook(partial(mask, number))

    def set_capacity(self, rank: int, block_share: Fraction) -> None:
        """Train the first ``rank`` columns of the first ``block_share`` of the blocks.

        Args:
            rank: 0 to the LoRA's rank.
            block_share: 0 to 1; the number of blocks is rounded up.
        """
        num_blocks = math.ceil(block_share * len(self.ranks))
        self.ranks = [rank if number < num_blocks else 0 for number in range(len(self.ranks))]

    def _mask(self, block: int, gradient: Tensor) -> Tensor:
        masked = gradient.clone()
        masked[:, self.ranks[block] :] = 0
        return masked

    def _mask_whole(self, block: int, gradient: Tensor) -> Tensor:
        return gradient if self.ranks[block] else torch.zeros_like(gradient)


def by_block(denoiser: ModelMixin, part: str) -> list[list[nn.Parameter]]:
    """Parameters of the LoRA's layers by block, in order from input to output.

    A block is an element of a numbered list of modules (``down_blocks.0``, ``transformer_blocks.11``); a layer outside
    such lists is its own block.

    Args:
        part: ``lora_B``: the second factors, ``[out, rank, ...]`` each; `MAGNITUDE`: those of a DoRA.
    """
    blocks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in denoiser.named_parameters():
        if f".{part}.{POLICY}." in name:
            blocks.setdefault(_block_of(name), []).append(parameter)
    in_order = sorted(blocks, key=lambda name: name.startswith(AFTER_BLOCKS))  # some models register them before others
    return [blocks[name] for name in in_order]


def _block_of(name: str) -> str:
    parts = name.split(".lora_")[0].split(".")
    numbers = (index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: next(numbers, len(parts)) + 1])

"""Saved LoRA -> factors of each layer."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cdpo_ray.models.lora import read_lora


@dataclass(frozen=True)
class Factors:
    """The LoRA of one linear or convolution layer.

    Attributes:
        down: ``[rank, input]``; convolution: ``[rank, input, height, width]``.
        up: ``[output, rank]``; convolution: ``[output, rank, 1, 1]``.
        alpha: scale of the weight change, before division by the rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    def weight_change(self) -> Tensor:
        """``alpha / rank * up @ down``, fp32, in the shape of the layer's weight. Source: arXiv:2106.09685."""
        rank = len(self.down)
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / rank * product).reshape(len(self.up), *self.down.shape[1:])


def read_factors(lora_dir: Path, denoiser_name: str) -> dict[str, Factors]:
    """Factors by layer of the denoiser, sorted by name.

    Args:
        lora_dir: folder written by `cdpo_ray.models.lora.save_lora`.
        denoiser_name: `unet` or `transformer`, the prefix of every name in the file.

    Raises:
        ModelError: the file is damaged, see `read_lora`.
    """
    saved = read_lora(lora_dir, denoiser_name)
    return {layer: Factors(down, up, saved.alpha) for layer, (down, up) in saved.factors.items()}


@torch.no_grad()
def merge(denoiser: torch.nn.Module, factors: dict[str, Factors]) -> None:
    """Add each layer's weight change in place, computed in fp32 and rounded once to the weight's dtype."""
    for layer, found in factors.items():
        weight = denoiser.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + found.weight_change())

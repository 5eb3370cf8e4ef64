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
        magnitudes: norms of the rows of the changed weight; `None`: not a DoRA.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitudes: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the LoRA, fp32. Source of magnitudes: arXiv:2402.09353."""
        changed = weight.float() + self.weight_change()
        if self.magnitudes is None:
            return changed
        rows = changed.flatten(1)
        factor = self.magnitudes.float().reshape(-1, 1) / rows.norm(dim=1, keepdim=True)
        return (factor * rows).reshape(weight.shape)

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
    return {
        layer: Factors(down, up, saved.scale * saved.rank, saved.magnitudes.get(layer))
        for layer, (down, up) in saved.factors.items()
    }


@torch.no_grad()
def merge(denoiser: torch.nn.Module, factors: dict[str, Factors]) -> None:
    """Change each layer's weight in place, computed in fp32 and rounded once to the weight's dtype."""
    for layer, found in factors.items():
        weight = denoiser.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        weight.copy_(found.merged(weight))

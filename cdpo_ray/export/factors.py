"""Saved LoRA -> the factors of each layer."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor

from cdpo_ray.models.lora import LORA_WEIGHTS


@dataclass(frozen=True)
class Factors:
    """The LoRA of one linear or convolution layer.

    Attributes:
        down: ``[rank, input]``, of a convolution ``[rank, input, height, width]``.
        up: ``[output, rank]``, of a convolution ``[output, rank, 1, 1]``.
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
    """Layer of the denoiser -> its factors, in the order of their names.

    Args:
        lora_dir: written by `cdpo_ray.models.lora.save_lora`.
        denoiser_name: `unet` or `transformer`, which the file puts before every name.
    """
    with safe_open(lora_dir / LORA_WEIGHTS, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
    alpha = float(metadata[f"{denoiser_name}.lora_alpha"])
    suffix = ".lora_A.weight"
    layers = sorted(name.removesuffix(suffix) for name in tensors if name.endswith(suffix))
    assert 2 * len(layers) == len(tensors), "two factors a layer, and nothing else"
    return {
        layer.removeprefix(f"{denoiser_name}."): Factors(
            tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"], alpha
        )
        for layer in layers
    }


@torch.no_grad()
def merge(denoiser: torch.nn.Module, factors: dict[str, Factors]) -> None:
    """Add each layer's weight change in place, in fp32, rounded once to the weight's own type."""
    for layer, found in factors.items():
        weight = denoiser.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        weight.copy_(weight.float() + found.weight_change())

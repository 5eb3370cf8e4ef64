"""Frozen linear layers -> the same layers with weights stored in 8 or 4 bits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdpo_ray.errors import ModelError

INT8_MAX = 127


@torch.no_grad()
def quantize_linears(net: nn.Module, storage: str, device: str) -> None:
    """Quantise every linear layer of a frozen module, in place and one by one.

    The device never holds the unquantised module. Convolutions, norms, embeddings and biases keep their dtype. Only
    weights are rounded, not activations, so that a sample's output does not depend on the rest of its batch and is a
    smooth function of a LoRA.

    Args:
        storage: ``int8``: `Int8Linear`. ``nf4``: 4-bit NormalFloat of bitsandbytes, in blocks of 64 with 8-bit scales
            in blocks of 256.
        device: device of the quantised layers.

    Raises:
        ModelError: if ``nf4`` is chosen and bitsandbytes is not installed.

    Source: arXiv:2305.14314 (nf4).
    """
    make = {"int8": Int8Linear, "nf4": _nf4_linear}[storage]
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, make(layer, device))


class Int8Linear(nn.Linear):
    """Frozen linear layer with 8-bit weights and one fp32 scale per output channel; the weight is ``weight * scale``.

    The product is computed in the input's dtype. The backward pass dequantises the weights again instead of keeping a
    copy of them.

    Args:
        layer: layer to quantise; its weight is not kept.
        device: device of the quantised layer.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear, device: str) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.compute_dtype = layer.weight.dtype  # models of diffusers convert fp32 inputs to it, as for bitsandbytes
        weight = layer.weight.detach().to(device).float()
        scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / INT8_MAX
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = _frozen_bias(layer, device)  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Int8Product.apply(input, self.weight, self.scale, self.bias)
        return product


class _Int8Product(torch.autograd.Function):
    """``input @ (weight * scale).T + bias``; differentiable in the input only."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(input, _dequantized(weight, scale, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ _dequantized(weight, scale, gradient.dtype), None, None, None


def _dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight * scale).to(dtype)


def _nf4_linear(layer: nn.Linear, device: str) -> nn.Linear:
    try:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit
    except ImportError:
        raise ModelError(
            '`model.quantization` nf4 needs bitsandbytes, which is not installed; pip install "cdpo_ray[lowmem]"'
        ) from None
    quantized = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    quantized.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=quantized)
    quantized.bias = _frozen_bias(layer, device)  # type: ignore[assignment]
    # with AVX512-BF16, a CPU forward pass without gradients would repack the weights for a kernel without a backward
    quantized.support_avx512bf16_for_cpu = False
    moved: nn.Linear = quantized.to(device)  # bitsandbytes quantises during this move
    return moved


def _frozen_bias(layer: nn.Linear, device: str) -> nn.Parameter | None:
    return None if layer.bias is None else nn.Parameter(layer.bias.detach().to(device), requires_grad=False)

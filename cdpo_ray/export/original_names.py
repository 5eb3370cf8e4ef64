"""Layers of diffusers' transformers -> layers of the checkpoints that their authors published.

Programs other than diffusers use the authors' names, and some layers that diffusers splits are one layer there, such
as queries, keys and values. The tables follow diffusers' own conversion of those checkpoints
(``diffusers.loaders.single_file_utils``), which the tests use to check them.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cdpo_ray.errors import ModelError, printable
from cdpo_ray.export.factors import Factors

Layers = Mapping[str, tuple[str, ...]]
"""Layer of the authors -> the layers of diffusers whose rows it holds, in order; ``{}`` is the number of a block."""

_BLOCK = re.compile(r"(?:(?<=blocks\.)|(?<=layers\.)|(?<=refiner\.))\d+(?=\.)")
_EMBEDDED_TIME = "time_text_embed.timestep_embedder"
_EMBEDDED_TEXT = "time_text_embed.text_embedder"
_QKV, _ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _each(block: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{block}.{name}" for name in names)


_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"

FLUX: Layers = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": (f"{_EMBEDDED_TIME}.linear_1",),
    "time_in.out_layer": (f"{_EMBEDDED_TIME}.linear_2",),
    "vector_in.in_layer": (f"{_EMBEDDED_TEXT}.linear_1",),
    "vector_in.out_layer": (f"{_EMBEDDED_TEXT}.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "double_blocks.{}.img_mod.lin": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear",),
    "double_blocks.{}.img_attn.qkv": _each(f"{_DOUBLE}.attn", _QKV),
    "double_blocks.{}.txt_attn.qkv": _each(f"{_DOUBLE}.attn", _ADDED_QKV),
    "double_blocks.{}.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2",),
    "single_blocks.{}.modulation.lin": (f"{_SINGLE}.norm.linear",),
    "single_blocks.{}.linear1": (*_each(f"{_SINGLE}.attn", _QKV), f"{_SINGLE}.proj_mlp"),
    "single_blocks.{}.linear2": (f"{_SINGLE}.proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}

STABLE_DIFFUSION_3: Layers = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": (f"{_EMBEDDED_TIME}.linear_1",),
    "t_embedder.mlp.2": (f"{_EMBEDDED_TIME}.linear_2",),
    "y_embedder.mlp.0": (f"{_EMBEDDED_TEXT}.linear_1",),
    "y_embedder.mlp.2": (f"{_EMBEDDED_TEXT}.linear_2",),
    "joint_blocks.{}.x_block.adaLN_modulation.1": (f"{_DOUBLE}.norm1.linear",),
    "joint_blocks.{}.context_block.adaLN_modulation.1": (f"{_DOUBLE}.norm1_context.linear",),
    "joint_blocks.{}.x_block.attn.qkv": _each(f"{_DOUBLE}.attn", _QKV),
    "joint_blocks.{}.context_block.attn.qkv": _each(f"{_DOUBLE}.attn", _ADDED_QKV),
    "joint_blocks.{}.x_block.attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "joint_blocks.{}.context_block.attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "joint_blocks.{}.x_block.attn2.qkv": _each(f"{_DOUBLE}.attn2", _QKV),
    "joint_blocks.{}.x_block.attn2.proj": (f"{_DOUBLE}.attn2.to_out.0",),
    "joint_blocks.{}.x_block.mlp.fc1": (f"{_DOUBLE}.ff.net.0.proj",),
    "joint_blocks.{}.x_block.mlp.fc2": (f"{_DOUBLE}.ff.net.2",),
    "joint_blocks.{}.context_block.mlp.fc1": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "joint_blocks.{}.context_block.mlp.fc2": (f"{_DOUBLE}.ff_context.net.2",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}

FLUX2: Layers = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "double_blocks.{}.img_attn.qkv": _each(f"{_DOUBLE}.attn", _QKV),
    "double_blocks.{}.txt_attn.qkv": _each(f"{_DOUBLE}.attn", _ADDED_QKV),
    "double_blocks.{}.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": (f"{_DOUBLE}.ff.linear_in",),
    "double_blocks.{}.img_mlp.2": (f"{_DOUBLE}.ff.linear_out",),
    "double_blocks.{}.txt_mlp.0": (f"{_DOUBLE}.ff_context.linear_in",),
    "double_blocks.{}.txt_mlp.2": (f"{_DOUBLE}.ff_context.linear_out",),
    "single_blocks.{}.linear1": (f"{_SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks.{}.linear2": (f"{_SINGLE}.attn.to_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}


def _z_image_block(block: str, *, modulated: bool = True) -> dict[str, tuple[str, ...]]:
    same = [f"feed_forward.w{number}" for number in (1, 2, 3)] + ["adaLN_modulation.0"] * modulated
    return {
        f"{block}.attention.qkv": _each(f"{block}.attention", _QKV),
        f"{block}.attention.out": (f"{block}.attention.to_out.0",),
        **{f"{block}.{name}": (f"{block}.{name}",) for name in same},
    }


Z_IMAGE: Layers = {
    "x_embedder": ("all_x_embedder.2-1",),
    "cap_embedder.1": ("cap_embedder.1",),
    "t_embedder.mlp.0": ("t_embedder.mlp.0",),
    "t_embedder.mlp.2": ("t_embedder.mlp.2",),
    **_z_image_block("noise_refiner.{}"),
    **_z_image_block("context_refiner.{}", modulated=False),
    **_z_image_block("layers.{}"),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
}

ORIGINAL_LAYERS: Mapping[str, Layers] = {
    "flux": FLUX,
    "stable_diffusion_3": STABLE_DIFFUSION_3,
    "flux2": FLUX2,
    "z_image": Z_IMAGE,
}
"""Family -> its table; in the other families, programs read diffusers' names."""

_OUTPUTS_PER_INPUT = {"proj_mlp": 4}
"""Output width of a part of a fused layer, in input widths, where it is not 1."""

_SHIFT_FIRST = ("norm_out.linear", "norm1_context.linear")
"""Layers whose outputs are scale and shift in diffusers, but shift and scale in the authors' checkpoints.

Only where they have these two outputs: a continuous adaptive normalization.
"""


def in_original_layers(family: str, factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Factors by layer of the authors' checkpoint, if the family has a table, else unchanged.

    Where the checkpoint fuses several layers, the first factors are stacked and the second ones are the blocks of a
    block-diagonal matrix, so that the rank is the sum of the ranks; alpha grows with it. A layer without a LoRA, fused
    with others, has a block without columns.

    Args:
        family: name in `FAMILIES`.
        factors: by layer of diffusers' denoiser.

    Raises:
        ModelError: the family has a table, but no such layer.
    """
    if family not in ORIGINAL_LAYERS:
        return dict(factors)
    place = {part: (layer, parts) for layer, parts in ORIGINAL_LAYERS[family].items() for part in parts}
    fused: dict[str, Factors] = {}
    for name in factors:
        template = _BLOCK.sub("{}", name)
        if template not in place:
            raise ModelError(f"the LoRA has the layer {printable(name)}, which no {family} model has; do not use it")
        (number,) = _BLOCK.findall(name) or ("",)
        layer, parts = place[template]
        original = layer.format(number)
        if original not in fused:
            fused[original] = _fused({part: factors.get(part.format(number)) for part in parts})
    return fused


def _fused(parts: Mapping[str, Factors | None]) -> Factors:
    """One layer's factors from those of its parts, in the order of its rows; ``None``: the part has no LoRA."""
    found = [part for part in parts.values() if part]
    if len(parts) == 1:
        ((name, only),) = parts.items()
        assert only is not None
        return Factors(only.down, _shift_first(name, only), only.alpha)
    width = found[0].down.shape[1]
    blocks = [
        part.up if part else found[0].up.new_zeros(width * _OUTPUTS_PER_INPUT.get(name.rpartition(".")[2], 1), 0)
        for name, part in parts.items()
    ]
    down = torch.cat([part.down for part in found])
    return Factors(down, torch.block_diag(*blocks), found[0].alpha / len(found[0].down) * len(down))


def _shift_first(layer: str, factors: Factors) -> Tensor:
    up = factors.up
    if layer.endswith(_SHIFT_FIRST) and len(up) == 2 * factors.down.shape[1]:
        scale, shift = up.chunk(2)
        return torch.cat([shift, scale])
    return up

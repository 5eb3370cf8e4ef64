"""Pipelines in diffusers layout -> single files with the names of the original, published code."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
SINGLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def renamed(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def unet_name(name: str, num_layers: int, attending: set[str]) -> str:
    """Name in CompVis' `openaimodel.py`, which numbers the layers of all levels in one list.

    Args:
        num_layers: layers per level.
        attending: up levels with attention, as ``up_blocks.1``.
    """
    parts = name.split(".")
    module, end = ".".join(parts[:-1]), parts[-1]
    if module in SINGLE:
        return f"{SINGLE[module]}.{end}"
    if parts[0] == "mid_block":
        number = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}[".".join(parts[1:3])]
        rest = ".".join(parts[3:])
        return f"middle_block.{number}.{renamed(rest, RESNET) if parts[1] == 'resnets' else rest}"
    kind, level, what, layer = parts[0], int(parts[1]), parts[2], int(parts[3])
    rest = ".".join(parts[4:])
    side, first = ("input_blocks", 1 + level * (num_layers + 1)), 0
    if kind == "up_blocks":
        side = ("output_blocks", level * (num_layers + 1))
        first = 2 if f"up_blocks.{level}" in attending else 1
    if what == "downsamplers":
        return f"{side[0]}.{side[1] + num_layers}.0.op.{end}"
    if what == "upsamplers":
        return f"{side[0]}.{side[1] + num_layers}.{first}.conv.{end}"
    place = f"{side[0]}.{side[1] + layer}"
    return f"{place}.0.{renamed(rest, RESNET)}" if what == "resnets" else f"{place}.1.{rest}"


def vae_name(name: str, num_levels: int) -> str:
    """Name in CompVis' `model.py`, whose decoder counts levels from the output."""
    parts = name.split(".")
    if "mid_block" in parts:
        layer, rest = int(parts[3]), ".".join(parts[4:])
        if parts[2] == "resnets":
            return f"{parts[0]}.mid.block_{layer + 1}.{rest}"
        return f"{parts[0]}.mid.attn_1." + renamed(
            rest, {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        )
    if len(parts) > 3 and parts[1] in ("down_blocks", "up_blocks"):
        up = parts[1] == "up_blocks"
        level = num_levels - 1 - int(parts[2]) if up else int(parts[2])
        place = f"{parts[0]}.{'up' if up else 'down'}.{level}"
        if parts[3].endswith("samplers"):
            return f"{place}.{parts[3].removesuffix('rs')[:-1]}e.conv.{parts[-1]}"
        return f"{place}.block.{parts[4]}." + renamed(".".join(parts[5:]), {"conv_shortcut": "nin_shortcut"})
    return name.replace("conv_norm_out", "norm_out")


def unet_weights(unet: torch.nn.Module) -> dict[str, Tensor]:
    weights = unet.state_dict()
    attending = {".".join(name.split(".")[:2]) for name in weights if ".attentions." in name}
    return {unet_name(name, unet.config.layers_per_block, attending): value for name, value in weights.items()}


def vae_weights(vae: torch.nn.Module) -> dict[str, Tensor]:
    named = {vae_name(name, len(vae.config.block_out_channels)): value for name, value in vae.state_dict().items()}
    square = (".q.weight", ".k.weight", ".v.weight", ".proj_out.weight")  # convolutions of 1 x 1 there
    return {name: value[:, :, None, None] if name.endswith(square) else value for name, value in named.items()}


def clip_weights(text_encoder: torch.nn.Module) -> dict[str, Tensor]:
    return {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in text_encoder.state_dict().items()
    }


def open_clip_weights(text_encoder: torch.nn.Module) -> dict[str, Tensor]:
    weights = {name.removeprefix("text_model."): value for name, value in text_encoder.state_dict().items()}
    found = {}
    for name, value in weights.items():
        if name == "text_projection.weight":
            found["text_projection"] = value.T
        elif ".q_proj." in name:
            fused = torch.cat([weights[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")])
            found[renamed(name.replace("self_attn.q_proj.", "attn.in_proj_"), OPEN_CLIP)] = fused
        elif "k_proj" not in name and "v_proj" not in name:
            found[renamed(name, OPEN_CLIP)] = value
    return found | {"logit_scale": torch.ones([])}


def original_weights(folder: Path, kind: str) -> dict[str, Tensor]:
    """Weights of a pipeline as in a published file.

    Args:
        kind: ``sd1``, ``sd2`` or ``sdxl``.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder)
    parts = {"model.diffusion_model.": unet_weights(pipeline.unet), "first_stage_model.": vae_weights(pipeline.vae)}
    if kind == "sd1":
        parts["cond_stage_model.transformer."] = clip_weights(pipeline.text_encoder)
    elif kind == "sd2":
        parts["cond_stage_model.model."] = sd2_text_weights(pipeline.text_encoder)
    else:
        parts["conditioner.embedders.0.transformer."] = clip_weights(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_weights(pipeline.text_encoder_2)
    return dict(prefixed(parts)) | buffers(kind)


def sd2_text_weights(text_encoder: torch.nn.Module) -> dict[str, Tensor]:
    """Weights of open_clip's text encoder, which has a last layer and a projection that Stable Diffusion 2 lacks."""
    found = open_clip_weights(text_encoder)
    last, after = (f"transformer.resblocks.{text_encoder.config.num_hidden_layers + number}." for number in (-1, 0))
    more = {name.replace(last, after): value + 1 for name, value in found.items() if name.startswith(last)}
    return found | more | {"text_projection": torch.ones(text_encoder.config.hidden_size, 32)}


def buffers(kind: str) -> dict[str, Tensor]:
    """Tensors that are not weights."""
    if kind == "sdxl":
        return {"denoiser.sigmas": torch.ones(1000)}
    names = ("betas", "alphas_cumprod", "sqrt_alphas_cumprod", "posterior_variance", "model_ema.decay")
    position_ids = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {name: torch.ones(1000) for name in names} | (position_ids if kind == "sd1" else {})


def prefixed(parts: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for prefix, weights in parts.items():
        for name, value in weights.items():
            yield f"{prefix}{name}", value


def write_single_file(weights: Mapping[str, Tensor], path: Path) -> Path:
    save_file({name: value.clone().contiguous() for name, value in weights.items()}, path)
    return path

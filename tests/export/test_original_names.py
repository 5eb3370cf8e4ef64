"""Layers of the authors' checkpoints, checked by diffusers' own conversion of those checkpoints."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from cdpo_ray.errors import ModelError
from cdpo_ray.export.factors import Factors
from cdpo_ray.export.kohya import kohya_tensors
from cdpo_ray.export.original_names import in_original_layers

RANK, ALPHA = 2, 3.0
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, Tensor]]]] = {
    "flux": (
        lambda: FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True),
        convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "stable_diffusion_3": (
        lambda: SD3Transformer2DModel(num_layers=3, dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "flux2": (
        lambda: Flux2Transformer2DModel(
            num_layers=2, num_single_layers=2, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ),
        convert_flux2_transformer_checkpoint_to_diffusers,
    ),
    "z_image": (lambda: ZImageTransformer2DModel(n_layers=2), convert_z_image_transformer_checkpoint_to_diffusers),
}
"""Family -> its published widths with few blocks, and the conversion."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = [("",), ATTENTION, ("to_v",), ("to_q", "proj_mlp"), ("to_k", "add_k_proj", "norm1_context.linear")]
"""Endings of the layers with a LoRA; the empty one is every layer."""


class Checkpoint(dict[str, Tensor]):
    """Outputs of layers in place of their weights; biases and norms, which a LoRA does not change, are zero."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self.num_rows = {name.removesuffix(".weight"): len(value) for name, value in weights.items()}

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key) if key in self else torch.zeros(self.num_rows.get(key.removesuffix(".bias"), 1))


def layers_of(family: str) -> dict[str, nn.Module]:
    with torch.device("meta"):
        net = QwenImageTransformer2DModel(num_layers=2) if family == "qwen_image" else CASES[family][0]()
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def random_factors(layers: dict[str, nn.Module], targets: Sequence[str]) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: Factors(
            torch.randn(RANK, *layer.weight.shape[1:], generator=generator),
            torch.randn(layer.weight.shape[0], RANK, *(1 for _ in layer.weight.shape[2:]), generator=generator),
            ALPHA,
        )
        for name, layer in layers.items()
        if name.endswith(tuple(targets))
    }


def output_change(factors: Factors) -> Tensor:
    """Change of a layer's outputs for one input, which depends on the input's width only; fp64."""
    down, up = factors.down.double().flatten(1), factors.up.double().flatten(1)
    width = down.shape[1]
    inputs = torch.randn(width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    return factors.alpha / len(down) * up @ (down @ inputs / width**0.5)


@pytest.mark.parametrize("targets", TARGETS, ids=lambda targets: "+".join(targets) or "all")
@pytest.mark.parametrize("family", CASES)
def test_each_layer_has_its_weight_change_after_diffusers_conversion(family: str, targets: Sequence[str]) -> None:
    layers = layers_of(family)
    factors = random_factors(layers, targets)
    assert factors
    every = in_original_layers(family, random_factors(layers, [""]))
    found = in_original_layers(family, factors)
    assert found.keys() <= every.keys()
    weights = {
        f"{name}.weight": output_change(found[name]) if name in found else torch.zeros(len(part.up)).double()
        for name, part in every.items()
    }
    checkpoint = Checkpoint(weights)
    converted = CASES[family][1](checkpoint)
    assert not checkpoint, "the conversion knows every layer"
    for name, layer in layers.items():
        expected = output_change(factors[name]) if name in factors else torch.zeros(len(layer.weight)).double()
        torch.testing.assert_close(converted[f"{name}.weight"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", ["transformer_blocks.0.attn.to_x", "blocks.0.blocks.1.proj_out", "{}"])
def test_a_layer_that_the_family_does_not_have_is_refused(layer: str) -> None:
    factors = {layer: Factors(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)}
    with pytest.raises(ModelError, match=rf"has the layer {re.escape(layer)}, which no flux model has; do not use it"):
        in_original_layers("flux", factors)


def test_alpha_over_rank_stays_where_layers_are_fused() -> None:
    layers = layers_of("flux")
    fused = in_original_layers("flux", random_factors(layers, ATTENTION))["double_blocks.1.img_attn.qkv"]
    assert fused.down.shape == (3 * RANK, 3072) and fused.up.shape == (3 * 3072, 3 * RANK)
    assert fused.alpha / len(fused.down) == ALPHA / RANK


@pytest.mark.parametrize("targets", [("",), ATTENTION], ids=["all", "attention"])
@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("flux", FluxPipeline),
        ("flux2", Flux2KleinPipeline),
        ("z_image", ZImagePipeline),
        ("qwen_image", QwenImagePipeline),
    ],
)
def test_diffusers_reads_the_blocks_of_a_kohya_file(
    family: str, pipeline: Any, targets: Sequence[str], tmp_path: Path
) -> None:
    in_blocks = {
        name: layer for name, layer in layers_of(family).items() if re.search(r"(blocks|layers|refiner)\.", name)
    }
    factors = random_factors(in_blocks, targets)
    save_file(kohya_tensors(family, factors), tmp_path / "lora.safetensors")
    read = pipeline.lora_state_dict(tmp_path, weight_name="lora.safetensors")
    names = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in read}
    assert factors.keys() <= names
    for name in names:
        down, up = (read[f"transformer.{name}.lora_{end}.weight"] for end in "AB")
        expected = output_change(factors[name]) if name in factors else torch.zeros(len(up)).double()
        found = output_change(Factors(down, up, float(len(down))))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

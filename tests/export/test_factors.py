"""LoRA factors read from a file, against PEFT's weight changes."""

import json
from pathlib import Path

import pytest
import torch
from finished_runs import config_of, policy_of, save_policy
from safetensors.torch import save_file
from torch import nn

from cdpo_ray.errors import ModelError
from cdpo_ray.export.factors import Factors, merge, read_factors
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS

KINDS = ("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "downsamplers.0.conv")


def test_the_weight_change_of_every_layer_equals_pefts(tiny_sd15: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 6, "targets": KINDS}
    policy = policy_of(config_of(tmp_path, tiny_sd15, training={"lora": lora}))
    save_policy(policy, tmp_path)
    factors = read_factors(tmp_path / LORA_DIR, "unet")
    layers = {name: layer for name, layer in policy.denoiser.named_modules() if hasattr(layer, "lora_A")}
    assert list(factors) == sorted(layers)
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(factors[name].weight_change(), expected, rtol=1e-5, atol=1e-6)


def test_the_weight_change_of_a_linear_layer_equals_a_hand_computed_one() -> None:
    factors = Factors(down=torch.tensor([[1.0, 2.0, 3.0]]), up=torch.tensor([[10.0], [20.0]]), alpha=0.5)
    assert factors.weight_change().tolist() == [[5, 10, 15], [10, 20, 30]]


def test_the_weight_change_of_a_convolution_equals_two_successive_convolutions() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 3, 3, 3), (5, 2, 1, 1)))
    images = torch.randn((1, 3, 7, 7), generator=generator)
    in_a_row = 3 / 2 * nn.functional.conv2d(nn.functional.conv2d(images, down), up)
    at_once = nn.functional.conv2d(images, Factors(down, up, alpha=3.0).weight_change())
    torch.testing.assert_close(at_once, in_a_row, rtol=1e-4, atol=1e-5)


def test_merging_rounds_only_once() -> None:
    layer = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
    nn.init.ones_(layer[0].weight)
    merge(layer, {"0": Factors(torch.full((4, 1), 2.0**-5), torch.full((1, 4), 2.0**-5), alpha=4.0)})
    # four products of 2**-10, each below bfloat16's step of 2**-7 at 1; their sum is half a step, rounded to even
    assert layer[0].weight.item() == 1
    merge(layer, {"0": Factors(torch.full((4, 1), 2.0**-5), torch.full((1, 4), 2.0**-5), alpha=5.0)})
    assert layer[0].weight.item() == 1 + 2**-7


FIRST, SECOND = "unet.a.lora_A.weight", "unet.a.lora_B.weight"
WHOLE = {FIRST: torch.ones(1, 2), SECOND: torch.ones(2, 1)}
DAMAGES: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no tensors": ({}, "two factors per layer and nothing else, got 0 tensors"),
    "half of a pair": ({FIRST: torch.ones(1, 2)}, "two factors per layer and nothing else, got 1 tensors"),
    "other tensors": (WHOLE | {"unet.a.lora_magnitude_vector": torch.ones(1)}, "two factors per layer"),
    "not a number": (WHOLE | {SECOND: torch.tensor([[1.0], [float("nan")]])}, "1 tensors must be finite floats"),
    "infinite": (WHOLE | {FIRST: torch.tensor([[1.0, float("inf")]])}, "1 tensors must be finite floats"),
    "integers": (WHOLE | {FIRST: torch.ones(1, 2, dtype=torch.int8)}, "1 tensors must be finite floats"),
    "two ranks": (WHOLE | {SECOND: torch.ones(2, 3)}, "factors must have one rank"),
    "another net's": (
        {name.replace("unet", "text_encoder"): value for name, value in WHOLE.items()},
        "does not belong to the unet",
    ),
}


def write_lora(folder: Path, tensors: dict[str, torch.Tensor], metadata: object) -> None:
    save_file(tensors, folder / LORA_WEIGHTS, metadata={"lora_adapter_metadata": json.dumps(metadata)})


@pytest.mark.parametrize("damage", DAMAGES)
def test_fault_48_a_damaged_lora_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    tensors, message = DAMAGES[damage]
    write_lora(tmp_path, tensors, {"unet.lora_alpha": 1})
    with pytest.raises(ModelError, match=rf"pytorch_lora_weights\.safetensors: .*{message}"):
        read_factors(tmp_path, "unet")


@pytest.mark.parametrize(
    "metadata",
    [{}, {"unet.r": 4}, {"unet.lora_alpha": "1"}, {"unet.lora_alpha": 0}, {"unet.lora_alpha": 1e999}, [], None],
)
def test_fault_48_a_lora_without_alpha_is_refused_by_name(metadata: object, tmp_path: Path) -> None:
    write_lora(tmp_path, WHOLE, metadata)
    with pytest.raises(ModelError, match=r"pytorch_lora_weights\.safetensors: cannot be read"):
        read_factors(tmp_path, "unet")


def test_fault_48_a_missing_lora_and_one_of_another_format_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"pytorch_lora_weights\.safetensors: is missing"):
        read_factors(tmp_path, "unet")
    (tmp_path / LORA_WEIGHTS).write_bytes(b"\x80\x04pickle")
    with pytest.raises(ModelError, match=r"pytorch_lora_weights\.safetensors: cannot be read"):
        read_factors(tmp_path, "unet")
    save_file(WHOLE, tmp_path / LORA_WEIGHTS)
    with pytest.raises(ModelError, match=r"metadata `unet\.lora_alpha` must be a number"):
        read_factors(tmp_path, "unet")

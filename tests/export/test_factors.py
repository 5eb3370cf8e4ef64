"""Factors read from a file give what PEFT adds to each layer."""

import json
from pathlib import Path

import pytest
import torch
from finished_runs import config_of, policy_of, save_policy
from safetensors.torch import save_file
from torch import nn

from cdpo_ray.export.factors import Factors, merge, read_factors
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS

KINDS = ("to_q", "to_out.0", "ff.net.2", "proj_in", "conv1", "downsamplers.0.conv")


def test_every_layers_change_is_the_one_that_peft_computes(tiny_sd15: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 6, "targets": KINDS}
    policy = policy_of(config_of(tmp_path, tiny_sd15, training={"lora": lora}))
    save_policy(policy, tmp_path)
    factors = read_factors(tmp_path / LORA_DIR, "unet")
    layers = {name: layer for name, layer in policy.denoiser.named_modules() if hasattr(layer, "lora_A")}
    assert list(factors) == sorted(layers)
    for name, layer in layers.items():
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(factors[name].weight_change(), expected, rtol=1e-5, atol=1e-6)


def test_the_change_of_a_linear_layer_by_hand() -> None:
    factors = Factors(down=torch.tensor([[1.0, 2.0, 3.0]]), up=torch.tensor([[10.0], [20.0]]), alpha=0.5)
    assert factors.weight_change().tolist() == [[5, 10, 15], [10, 20, 30]]


def test_the_change_of_a_convolution_is_the_two_convolutions_in_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 3, 3, 3), (5, 2, 1, 1)))
    images = torch.randn((1, 3, 7, 7), generator=generator)
    in_a_row = 3 / 2 * nn.functional.conv2d(nn.functional.conv2d(images, down), up)
    at_once = nn.functional.conv2d(images, Factors(down, up, alpha=3.0).weight_change())
    torch.testing.assert_close(at_once, in_a_row, rtol=1e-4, atol=1e-5)


def test_merging_rounds_once_so_that_small_changes_are_not_lost_on_the_way() -> None:
    layer = nn.Sequential(nn.Linear(1, 1, bias=False)).bfloat16()
    nn.init.ones_(layer[0].weight)
    merge(layer, {"0": Factors(torch.full((4, 1), 2.0**-5), torch.full((1, 4), 2.0**-5), alpha=4.0)})
    # four products of 2**-10, each below bfloat16's step of 2**-7 at 1; their sum is half a step, which goes to even
    assert layer[0].weight.item() == 1
    merge(layer, {"0": Factors(torch.full((4, 1), 2.0**-5), torch.full((1, 4), 2.0**-5), alpha=5.0)})
    assert layer[0].weight.item() == 1 + 2**-7


def test_a_file_with_other_tensors_than_pairs_of_factors_is_not_read_in_part(tmp_path: Path) -> None:
    tensors = {"unet.a.lora_A.weight": torch.ones(1, 2), "unet.a.lora_magnitude_vector": torch.ones(1)}
    tensors["unet.a.lora_B.weight"] = torch.ones(2, 1)
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1})}
    save_file(tensors, tmp_path / LORA_WEIGHTS, metadata=metadata)
    with pytest.raises(AssertionError, match="two factors a layer"):
        read_factors(tmp_path, "unet")

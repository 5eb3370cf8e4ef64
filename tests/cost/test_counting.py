"""Counts on meta tensors: single operators by hand, and SD1.5 against the table at other sizes than counted."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

from cdpo_ray.cost.counting import Meter, add_lora, count_folder, count_training, denoiser_of, fused_attention
from cdpo_ray.cost.footprint import ATTENTION_TARGETS
from cdpo_ray.cost.memory import CONTEXT_BYTES, DenoiserStorage, trainer_peak
from cdpo_ray.cost.published import published_footprint

SD15 = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": 64}
CONVOLUTIONS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_a_matrix_product_has_two_flops_per_multiply_add() -> None:
    with torch.device("meta"):
        layer = nn.Linear(32, 48)
    meter = Meter(layer)
    with meter:
        layer(meta(8, 32))
    assert meter.flops == 2 * 8 * 32 * 48


def test_live_storages_are_counted_but_weights_and_views_are_not() -> None:
    with torch.device("meta"):
        layer = nn.Linear(32, 48)
    meter, given = Meter(layer), meta(8, 32)
    with meter:
        first = layer(given) * 2
        view = first[:4].t()
        weight = layer.weight.t()
    assert meter.bytes == first.numel() * 4
    assert meter.peak_bytes == 2 * first.numel() * 4, "the product and its double"
    del first
    assert meter.bytes > 0 and weight is not None, "a view keeps the storage alive"
    del view
    assert meter.bytes == 0


def test_fused_attention_has_the_flops_of_two_products_and_no_quadratic_memory() -> None:
    query = meta(1, 2, 4096, 64)
    meter = Meter(nn.Identity())
    with fused_attention(), meter, torch.no_grad():
        functional.scaled_dot_product_attention(query, query, query)
    assert meter.flops == 2 * 2 * 2 * 4096 * 4096 * 64
    assert meter.peak_bytes < 4096 * 4096
    assert functional.scaled_dot_product_attention.__module__ != "cdpo_ray.cost.counting", "the function is restored"


def test_a_folder_is_counted_from_its_configurations(tiny_models: Callable[[str], Path]) -> None:
    folder = tiny_models("stable_diffusion_3")
    counted = count_folder(folder)
    weights = {name: _num_parameters(folder / name) for name in ("transformer", "vae")}
    assert (counted.parameters, counted.vae_parameters) == (weights["transformer"], weights["vae"])
    assert counted.text_parameters > 0 and counted.text_flops > 0
    at = counted.native_positions
    assert 0 < counted.forward_flops(at) < counted.backward_flops["full"](at)
    assert 0 < counted.inference_bytes(at) < counted.training_bytes["lora"](at)
    assert counted.checkpointed_bytes["full"](at) < counted.training_bytes["full"](at)


def _num_parameters(folder: Path) -> int:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("stable_diffusion_xl", (2, 4, 8, 8)),
        ("latent_consistency", (2, 4, 8, 8)),
        ("flux", (2, 16, 64)),  # patches of 2 x 2 latent values
        ("flux_schnell", (2, 16, 64)),
        ("flux2", (2, 64, 32)),
        ("z_image", (2, 16, 1, 8, 8)),  # one frame
        ("qwen_image", (2, 16, 64)),
        ("sana", (2, 32, 8, 8)),
    ],
)
def test_a_denoiser_gets_the_inputs_of_its_configuration(
    tiny_models: Callable[[str], Path], family: str, shape: tuple[int, ...]
) -> None:
    (path,) = (
        path for path in tiny_models(family).glob("*/config.json") if path.parent.name in ("unet", "transformer")
    )
    make, inputs, _ = denoiser_of(json.loads(path.read_text()))
    meter = Meter(denoiser := make())
    with fused_attention(), meter, torch.no_grad():
        (prediction,) = denoiser(**inputs(2, 8), return_dict=False)
    if isinstance(prediction, list):
        prediction = torch.stack(prediction)
    assert prediction.shape == shape and meter.flops > 0


@pytest.fixture
def half() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("half")
def test_a_forward_pass_of_sd15_matches_the_table_at_a_size_that_was_not_counted() -> None:
    make, inputs, native = denoiser_of(SD15)
    denoiser, table = make().eval(), published_footprint("sd15")
    found: dict[int, int] = {}
    for side in (native, 40):
        meter = Meter(denoiser)
        with fused_attention(), meter, torch.no_grad():
            denoiser(**inputs(1, side), return_dict=False)
        found[side] = meter.flops
    assert found[64] / 1e12 == pytest.approx(0.803, rel=0.002)
    assert {side: table.forward_flops(side * side) for side in found} == pytest.approx(found, rel=1e-9)


@pytest.mark.usefixtures("half")
@pytest.mark.parametrize(
    ("rank", "targets", "checkpointing", "side", "pairs", "use_dora"),
    [
        (8, ATTENTION_TARGETS, False, 40, 2, False),
        (8, ATTENTION_TARGETS, True, 88, 1, False),
        (64, CONVOLUTIONS, False, 80, 1, False),
        (8, ATTENTION_TARGETS, False, 40, 2, True),
        (8, ATTENTION_TARGETS, True, 88, 1, True),
    ],
)
def test_the_estimated_training_memory_is_within_15_percent_of_the_counted_peak(
    rank: int, targets: tuple[str, ...], checkpointing: bool, side: int, pairs: int, use_dora: bool
) -> None:
    make, inputs, _ = denoiser_of(SD15)
    denoiser, table = make(), published_footprint("sd15")
    add_lora(denoiser, rank=rank, targets=targets, use_dora=use_dora)
    denoiser.train()
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    _, activations = count_training(denoiser, inputs(2 * pairs, side))
    weights = sum(2 * parameter.numel() for parameter in denoiser.parameters())
    trainable = sum(parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad)
    assert trainable == table.lora_parameters(rank, targets) or use_dora
    options: dict[str, Any] = {"optimizer": "adamw", "zero_stage": 0, "num_workers": 1, "checkpointing": checkpointing}
    peak = trainer_peak(
        table,
        DenoiserStorage("bfloat16"),
        positions=side * side,
        pairs=pairs,
        lora=(rank, targets),
        **options,
        use_dora=use_dora,
    )
    assert peak.work == pytest.approx(activations, rel=0.15)
    assert peak.total - CONTEXT_BYTES == pytest.approx(weights + (2 + 4 + 8) * trainable + activations, rel=0.15)

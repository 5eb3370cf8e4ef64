"""A quantised base model: rounding as published, reference with adapters off, LoRA training, loading, merging."""

import math
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from tiny_policies import TARGETS, TinyModels, load, make_pairs, training_section
from torch import Tensor, nn

from cdpo_ray.config.training import LoraSection
from cdpo_ray.errors import ModelError
from cdpo_ray.export.formats import write_merged
from cdpo_ray.export.trained import Trained
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, save_lora
from cdpo_ray.models.quantization import Int8Linear, quantize_linears
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.training.engine import save_trained, start_engine
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import METRICS, loss_of_pairs

NF4_LEVELS = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
"""arXiv:2305.14314, appendix E."""
WEIGHTS_DTYPE = {"int8": torch.int8, "nf4": torch.uint8}
FAMILIES = ("stable_diffusion_xl", "flux", "flux2", "z_image", "qwen_image", "sana")
each_storage = pytest.mark.parametrize("storage", ["int8", "nf4"])
each_family = pytest.mark.parametrize("family", FAMILIES)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(128, 96, dtype=dtype)


def quantized(layer: nn.Linear, storage: str) -> Any:
    net = nn.Sequential(layer)
    quantize_linears(net, storage, "cpu")
    return net[0]


def num_bytes(layer: Any) -> int:
    """Bytes of the weight and its scales, without the bias."""
    if isinstance(layer, Int8Linear):
        return layer.weight.nbytes + layer.scale.nbytes
    state = layer.weight.quant_state
    return sum(value.nbytes for value in (layer.weight.data, state.absmax, state.offset, state.state2.absmax))


def prediction(model: TextToImageModel) -> Tensor:
    """Prediction of the denoiser for two prompts at fixed timesteps and noise."""
    conditioning, _ = model.encode_prompts(["a cat", "a dog"])
    shape = model.latent_shape(64, 64)
    times = model.draw_times(torch.Generator().manual_seed(1))
    times = {name: value.expand(2) for name, value in times.items()}
    noise = noise_at((2, *shape), 0, "noise")
    with torch.no_grad():
        task = model.denoising_task(model.denoiser, noise_at((2, *shape), 0, "latents"), conditioning, times, noise)
        return model.predict(model.denoiser, task)


def test_int8_weights_are_within_half_a_step_of_their_channel() -> None:
    layer = linear()
    rounded = quantized(layer, "int8")
    step = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((rounded.weight * rounded.scale - layer.weight).abs() <= 0.5001 * step).all()
    assert rounded.weight.dtype == torch.int8


def test_nf4_weights_are_the_nearest_published_level_of_their_block() -> None:
    layer = linear()
    rounded = quantized(layer, "nf4")
    found = dequantize_4bit(rounded.weight.data, rounded.weight.quant_state)
    blocks = layer.weight.detach().reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(NF4_LEVELS)
    nearest = levels[(blocks / largest)[..., None].sub(levels).abs().argmin(-1)] * largest
    # the scale of a block is stored in 8 bits
    torch.testing.assert_close(found.reshape(-1, 64), nearest, rtol=0.01, atol=0.01 * float(largest.max()))


@each_storage
def test_a_quantised_layer_multiplies_by_its_dequantised_weight_forward_and_backward(storage: str) -> None:
    rounded = quantized(linear(), storage)
    weight = (
        rounded.weight * rounded.scale
        if storage == "int8"
        else dequantize_4bit(rounded.weight.data, rounded.weight.quant_state)
    )
    inputs = noise_at((5, 128), 0, "inputs").requires_grad_()
    output = rounded(inputs)
    gradient = noise_at((5, 96), 0, "gradient")
    output.backward(gradient)
    torch.testing.assert_close(output, inputs @ weight.T + rounded.bias)
    torch.testing.assert_close(inputs.grad, gradient @ weight)


@each_storage
def test_backward_keeps_no_dequantised_copy_of_the_weights(storage: str) -> None:
    rounded = quantized(linear(torch.bfloat16), storage)
    inputs = noise_at((5, 128), 0, "inputs").bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        rounded(inputs)
    assert not [value for value in kept if value.is_floating_point() and value.numel() >= rounded.weight.numel()]


@each_storage
def test_bytes_per_weight_are_as_documented(storage: str) -> None:
    layer = nn.Linear(640, 640, dtype=torch.bfloat16)
    expected = {
        "int8": 1 + 4 / 640,  # a 4-byte scale per row of 640 weights
        "nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256),  # codes, 8-bit scales, their fp32 scales
    }[storage]
    assert num_bytes(quantized(layer, storage)) / layer.weight.numel() == pytest.approx(expected, rel=1e-3)


@each_storage
@each_family
def test_only_the_denoisers_linear_layers_are_quantised(tiny_models: TinyModels, family: str, storage: str) -> None:
    whole, model = load(tiny_models(family), family), load(tiny_models(family), family, quantization=storage)
    for name, layer in whole.denoiser.named_modules():
        found = model.denoiser.get_submodule(name)
        assert (type(found) is not type(layer)) == (type(layer) is nn.Linear), name
        if type(layer) is nn.Linear:
            assert found.weight.dtype == WEIGHTS_DTYPE[storage] and not found.weight.requires_grad
    for name in ("vae", *model.text_encoders):
        assert {p.dtype for p in getattr(model.pipeline, name).parameters()} == {torch.float32}


@pytest.mark.parametrize(("storage", "largest_change"), [("int8", 0.01), ("nf4", 0.2)])
@each_family
def test_rounding_changes_the_output_slightly(
    tiny_models: TinyModels, family: str, storage: str, largest_change: float
) -> None:
    expected = prediction(load(tiny_models(family), family))
    found = prediction(load(tiny_models(family), family, quantization=storage))
    assert 0 < float((found - expected).norm() / expected.norm()) < largest_change


CASES = [
    ("stable_diffusion_xl", "int8", "float32", 0, "adamw_8bit"),
    ("stable_diffusion_xl", "nf4", "bfloat16", 0, "adamw_8bit"),
    ("flux", "int8", "float32", 2, "adamw"),
    ("flux", "nf4", "bfloat16", 0, "adamw"),
    ("qwen_image", "int8", "float32", 2, "adamw"),
    ("sana", "nf4", "bfloat16", 0, "adamw"),
]
"""Family, storage, dtype, ZeRO stage, optimizer."""


def frozen_weights(model: TextToImageModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.denoiser.named_parameters() if "lora" not in name}


def trained(case: tuple[str, str, str, int, str], base_dir: Path, folder: Path) -> dict[str, Any]:
    """Three updates in CUDA's memory format: metrics of each, then base weights and predictions."""
    family, storage, dtype, zero_stage, optimizer = case
    model = load_model(family, path=str(base_dir), device="cpu", dtype=dtype, quantization=storage, for_training=True)
    if family == "stable_diffusion_xl":
        model.denoiser.to(memory_format=torch.channels_last)
    policy = make_policy(model, LoraSection(rank=4, alpha=8, targets=TARGETS))
    model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    section = training_section(learning_rate=1e-2, zero_stage=zero_stage, optimizer=optimizer)
    before = frozen_weights(model)
    engine = start_engine(model.denoiser, policy.trainable, section, num_workers=1)
    policy = replace(policy, net=engine)
    batch = make_pairs(model)
    metrics = []
    for _ in range(3):
        loss, found = loss_of_pairs(policy, batch, preference_loss=partial(preference_loss, beta=500.0))
        metrics.append(dict(zip(METRICS, found.tolist(), strict=True)))
        engine.backward(loss)
        engine.step()
    after = frozen_weights(model)
    save_trained(engine, model, folder, lora=True)
    model.denoiser.eval()
    return {
        "metrics": metrics,
        "base_unchanged": all(torch.equal(value, after[name]) for name, value in before.items()),
        "prediction": prediction(model),
    }


def work(rank: int, base_dirs: dict[str, Path], folder: Path) -> None:
    """All cases, in a separate process: DeepSpeed supports one process group per process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    for case in CASES:
        case_dir = folder / "-".join(map(str, case))
        torch.save(trained(case, base_dirs[case[0]], case_dir), case_dir / "found.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with each case's LoRA and results."""
    folder = tmp_path_factory.mktemp("trained")
    base_dirs = {family: tiny_models(family) for family in FAMILIES}
    torch.multiprocessing.spawn(work, (base_dirs, folder), nprocs=1)  # type: ignore[attr-defined]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_updates_train_the_lora_and_leave_the_quantised_base_as_the_exact_reference(
    tiny_models: TinyModels, folder: Path, case: tuple[str, str, str, int, str]
) -> None:
    family, storage, dtype, *_ = case
    case_dir = folder / "-".join(map(str, case))
    found = torch.load(case_dir / "found.pt", weights_only=True)
    losses, margins = ([each[name] for each in found["metrics"]] for name in ("loss", "margin"))
    assert margins[0] == 0 and losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[1] < losses[0]
    for name in ("reference_error_w", "reference_error_l"):
        assert len({each[name] for each in found["metrics"]}) == 1
    assert found["base_unchanged"]

    untuned, tuned = (load(tiny_models(family), family, dtype=dtype, quantization=storage) for _ in range(2))
    tuned.load_tuned(case_dir)
    tuned.use_tuned(False)
    base = prediction(untuned)
    assert torch.equal(prediction(tuned), base)
    tuned.use_tuned(True)
    expected, tolerance = found["prediction"], {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert float((prediction(tuned) - expected).norm() / expected.norm()) < tolerance
    assert float((expected - base).norm() / expected.norm()) > 2 * tolerance


def test_merging_starts_from_the_unquantised_weights(tiny_models: TinyModels, tmp_path: Path) -> None:
    arguments = {"path": str(tiny_models("flux")), "quantization": "int8", "offload": True}
    model = load_model("flux", **arguments, device="cpu")
    policy = make_policy(model, LoraSection(rank=4, targets=("to_q",)))
    for number, parameter in enumerate(policy.trainable):
        parameter.data = 0.1 * noise_at(tuple(parameter.shape), number, "trained").to(parameter.dtype)
    save_lora(model.pipeline_class, "transformer", model.denoiser, tmp_path / "training" / LORA_DIR)
    write_merged(Trained("run", tmp_path / "training", "flux", arguments), tmp_path / "merged")
    merged = load_model("flux", path=str(tmp_path / "merged"), device="cpu")
    unquantised = load(tiny_models("flux"), "flux")
    unquantised.load_tuned(tmp_path / "training")
    torch.testing.assert_close(prediction(merged), prediction(unquantised), rtol=1e-4, atol=1e-5)


def test_a_missing_package_is_named_with_its_extra(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn.modules", None)
    with pytest.raises(ModelError, match=r'`model\.quantization` nf4 needs bitsandbytes.*"cdpo_ray\[lowmem\]"'):
        load(tiny_models("flux"), "flux", quantization="nf4")
    load(tiny_models("flux"), "flux", quantization="int8")

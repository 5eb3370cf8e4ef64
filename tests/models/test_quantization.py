"""A quantised base: rounded as published, the same net under adapters off, trained around, loaded and merged."""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from cdpo_ray.errors import ModelError
from cdpo_ray.export.formats import Trained, write_merged
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, save_lora
from cdpo_ray.models.quantization import Int8Linear, quantize_linears
from cdpo_ray.models.seeds import noise_at
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.engine import save_trained, start_engine
from cdpo_ray.training.job import LoraJob, Optimization
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.policy import make_policy
from cdpo_ray.training.update import loss_of_pairs

NF4_LEVELS = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
"""arXiv:2305.14314, appendix E."""
WEIGHTS_DTYPE = {"int8": torch.int8, "nf4": torch.uint8}
FAMILIES = ("stable_diffusion_xl", "flux")
TinyModels = Callable[[str], Path]
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
    """Of the weight and what restores it, the bias aside."""
    if isinstance(layer, Int8Linear):
        return layer.weight.nbytes + layer.scale.nbytes
    state = layer.weight.quant_state
    return sum(value.nbytes for value in (layer.weight.data, state.absmax, state.offset, state.state2.absmax))


def load(tiny_models: TinyModels, family: str, **options: Any) -> TextToImageModel:
    return load_model(family, path=str(tiny_models(family)), device="cpu", **options)


def prediction(model: TextToImageModel) -> Tensor:
    """Of the denoiser, for two prompts at fixed times and noise."""
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
    # The scale of a block is itself stored in 8 bits.
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
def test_bytes_of_a_weight_are_as_documented(storage: str) -> None:
    layer = nn.Linear(640, 640, dtype=torch.bfloat16)
    expected = {
        "int8": 1 + 4 / 640,  # a scale of 4 bytes for each of 640 outputs
        "nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256),  # codes, 8-bit scales, their fp32 scales
    }[storage]
    assert num_bytes(quantized(layer, storage)) / layer.weight.numel() == pytest.approx(expected, rel=1e-3)


@each_storage
@each_family
def test_only_the_denoisers_linear_layers_are_quantised(tiny_models: TinyModels, family: str, storage: str) -> None:
    whole, model = load(tiny_models, family), load(tiny_models, family, quantization=storage)
    for name, layer in whole.denoiser.named_modules():
        found = model.denoiser.get_submodule(name)
        assert (type(found) is not type(layer)) == (type(layer) is nn.Linear), name
        if type(layer) is nn.Linear:
            assert found.weight.dtype == WEIGHTS_DTYPE[storage] and not found.weight.requires_grad
    for name in ("vae", *model.text_encoders):
        assert {p.dtype for p in getattr(model.pipeline, name).parameters()} == {torch.float32}


@pytest.mark.parametrize(("storage", "largest_change"), [("int8", 0.01), ("nf4", 0.15)])
@each_family
def test_rounding_changes_the_nets_output_a_little(
    tiny_models: TinyModels, family: str, storage: str, largest_change: float
) -> None:
    expected = prediction(load(tiny_models, family))
    found = prediction(load(tiny_models, family, quantization=storage))
    assert 0 < float((found - expected).norm() / expected.norm()) < largest_change


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def frozen_weights(model: TextToImageModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.denoiser.named_parameters() if "lora" not in name}


@pytest.mark.parametrize(
    ("family", "storage", "dtype", "zero_stage", "optimizer"),
    [
        ("stable_diffusion_xl", "int8", "float32", 0, "adamw_8bit"),
        ("stable_diffusion_xl", "nf4", "bfloat16", 0, "adamw_8bit"),
        ("flux", "int8", "float32", 2, "adamw"),
        ("flux", "nf4", "bfloat16", 0, "adamw"),
    ],
)
@pytest.mark.usefixtures("process_group")
def test_two_updates_train_a_lora_around_a_quantised_base_which_is_the_reference_exactly(
    tiny_models: TinyModels,
    tmp_path: Path,
    family: str,
    storage: str,
    dtype: str,
    zero_stage: int,
    optimizer: str,
) -> None:
    model = load(tiny_models, family, dtype=dtype, quantization=storage, for_training=True)
    lora = LoraJob(4, 8, ("to_q", "to_k", "to_v", "to_out.0"))
    policy = make_policy(model, lora, start_dir=None, reference_is_start=False, seed=0)
    model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    if family == "stable_diffusion_xl":
        model.denoiser.to(memory_format=torch.contiguous_format)
    optimization = Optimization(1e-2, 1e-4, 0.9, 0.999, 1.0, 2, 2, zero_stage=zero_stage, optimizer=optimizer)
    before = frozen_weights(model)
    engine = start_engine(model.denoiser, policy.trainable, optimization, num_workers=1)
    if family == "stable_diffusion_xl":
        model.denoiser.to(memory_format=torch.channels_last)
    shape = model.latent_shape(64, 64)
    conditioning, _ = model.encode_prompts(["a cat", "a dog"])
    times = [model.draw_times(torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    batch = PairBatch(
        noise_at((2, *shape), 0, "chosen"),
        noise_at((2, *shape), 0, "rejected"),
        conditioning,
        {name: torch.stack([time[name] for time in times]) for name in times[0]},
        noise_at((2, *shape), 0, "noise"),
    )
    metrics = []
    for _ in range(3):
        loss, found = loss_of_pairs(
            model, engine, policy.reference, engine.module, batch, preference_loss=partial(preference_loss, beta=500.0)
        )
        metrics.append(found)
        engine.backward(loss)
        engine.step()
    losses, margins = [float(each[0]) for each in metrics], [float(each[1]) for each in metrics]
    assert margins[0] == 0 and losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-6)
    assert losses[2] < losses[1] < losses[0]
    for key in (5, 6):  # errors of the reference, which no update changes
        assert len({float(each[key]) for each in metrics}) == 1
    after = frozen_weights(model)
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    save_trained(engine, model, tmp_path, lora=True)
    tuned = load(tiny_models, family, dtype=dtype, quantization=storage)
    tuned.load_tuned(tmp_path)
    tuned.use_tuned(False)
    untuned = load(tiny_models, family, dtype=dtype, quantization=storage)
    assert torch.equal(prediction(tuned), prediction(untuned))
    tuned.use_tuned(True)
    model.denoiser.eval()
    expected = prediction(model)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert float((prediction(tuned) - expected).norm() / expected.norm()) < tolerance
    assert float((expected - prediction(untuned)).norm() / expected.norm()) > 2 * tolerance


def test_a_merge_starts_from_the_weights_that_the_base_was_rounded_from(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    arguments = {"path": str(tiny_models("flux")), "quantization": "int8", "offload": True}
    model = load_model("flux", **arguments, device="cpu")
    policy = make_policy(model, LoraJob(4, 4, ("to_q",)), start_dir=None, reference_is_start=False, seed=0)
    for number, parameter in enumerate(policy.trainable):
        parameter.data = 0.1 * noise_at(tuple(parameter.shape), number, "trained").to(parameter.dtype)
    save_lora(model.pipeline_class, "transformer", model.denoiser, tmp_path / "training" / LORA_DIR)
    write_merged(Trained("run", tmp_path / "training", "flux", arguments), tmp_path / "merged")
    merged = load_model("flux", path=str(tmp_path / "merged"), device="cpu")
    unquantised = load(tiny_models, "flux")
    unquantised.load_tuned(tmp_path / "training")
    torch.testing.assert_close(prediction(merged), prediction(unquantised), rtol=1e-4, atol=1e-5)


def test_a_missing_package_is_named_with_its_extra(tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r'`model\.quantization` nf4 needs bitsandbytes.*"cdpo_ray\[lowmem\]"'):
        load(tiny_models, "flux", quantization="nf4")
    load(tiny_models, "flux", quantization="int8")

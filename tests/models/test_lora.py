"""A LoRA has no effect at first, can be switched off, and loads into a stock pipeline."""

import stat
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cdpo_ray.errors import ModelError
from cdpo_ray.models.lora import (
    LORA_DIR,
    LORA_WEIGHTS,
    POLICY,
    Adapters,
    attach_lora,
    read_lora,
    row_norms,
    save_lora,
)
from cdpo_ray.models.stable_diffusion import StableDiffusion
from cdpo_ray.randomness.noise import noise_at

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def with_lora(
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 4,
    seed: int = 0,
    targets: tuple[str, ...] = TARGETS,
    dtype: str = "float32",
    **variant: bool,
) -> tuple[StableDiffusion, list[nn.Parameter]]:
    model = StableDiffusion.load(str(folder), device="cpu", dtype=dtype)
    return model, attach_lora(model.denoiser, rank=rank, alpha=alpha, targets=targets, seed=seed, **variant)


def change(trainable: list[nn.Parameter], seed: int = 1) -> None:
    """Change the LoRA as if it were trained at a large learning rate."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def predict(model: StableDiffusion) -> Tensor:
    conditioning, _ = model.encode_prompts(["a cat", "a dog"])
    noisy = noise_at((2, 4, 8, 8), 0, "noisy")
    return model.denoiser(noisy, torch.tensor([10, 900]), conditioning["prompt_embedding"]).sample


@pytest.fixture(scope="module")
def base_prediction(tiny_sd15: Path) -> Tensor:
    return predict(StableDiffusion.load(str(tiny_sd15), device="cpu"))


def test_the_initial_output_equals_the_base_models_exactly(tiny_sd15: Path, base_prediction: Tensor) -> None:
    assert torch.equal(predict(with_lora(tiny_sd15)[0]), base_prediction)


def test_only_the_lora_is_trained_and_it_is_fp32(tiny_sd15: Path) -> None:
    model, trainable = with_lora(tiny_sd15, rank=3)
    targets = [
        layer
        for name, layer in model.pipeline.unet.named_modules()
        if name.endswith(TARGETS) and hasattr(layer, "lora_A")
    ]
    expected = sum(3 * (layer.in_features + layer.out_features) for layer in targets)
    assert sum(parameter.numel() for parameter in trainable) == expected > 0
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    trained = [name for name, parameter in model.denoiser.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(trainable) == 2 * len(targets)
    assert all("lora" in name for name in trained)


def test_the_first_factor_depends_on_the_seed_only(tiny_sd15: Path) -> None:
    first = [parameter.clone() for parameter in with_lora(tiny_sd15, seed=5)[1]]
    torch.manual_seed(123)
    again, other = with_lora(tiny_sd15, seed=5)[1], with_lora(tiny_sd15, seed=6)[1]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(first, other, strict=True))


def test_attaching_does_not_change_the_global_random_state(tiny_sd15: Path) -> None:
    model = StableDiffusion.load(str(tiny_sd15), device="cpu", for_training=True)
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    attach_lora(model.denoiser, rank=2, alpha=2, targets=TARGETS, seed=0)
    assert torch.equal(torch.randn(4), expected)


def test_with_adapters_off_a_trained_model_is_the_base_exactly_and_not_after_the_block(
    tiny_sd15: Path, base_prediction: Tensor
) -> None:
    model, trainable = with_lora(tiny_sd15)
    change(trainable)
    changed = predict(model)
    assert (changed - base_prediction).abs().max() > 1e-2
    with Adapters(model.denoiser).off():
        assert torch.equal(predict(model), base_prediction)
    assert torch.equal(predict(model), changed)


def test_adapters_are_enabled_again_after_an_error(tiny_sd15: Path, base_prediction: Tensor) -> None:
    model, trainable = with_lora(tiny_sd15)
    change(trainable)
    with pytest.raises(RuntimeError, match="in the block"), Adapters(model.denoiser).off():
        raise RuntimeError("in the block")
    assert not torch.equal(predict(model), base_prediction)


def test_the_update_of_a_layer_is_alpha_over_rank_times_the_product_of_the_factors(tiny_sd15: Path) -> None:
    model, trainable = with_lora(tiny_sd15, rank=4, alpha=10)
    change(trainable)
    layer = model.denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    values = noise_at((5, layer.in_features), 0, "x")
    with torch.no_grad():
        update = (layer(values) - layer.base_layer(values)).double()
    first, second = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    torch.testing.assert_close(update, 10 / 4 * values.double() @ first.T @ second.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (8, 2.0)])
def test_a_stock_pipeline_with_the_saved_lora_makes_the_same_images(
    tiny_sd15: Path, tmp_path: Path, rank: int, alpha: float
) -> None:
    model, trainable = with_lora(tiny_sd15, rank=rank, alpha=alpha)
    conditioning, _ = model.encode_prompts(["a cat"])
    noise = noise_at((1, 4, 8, 8), 0, "image", "a cat", 0)
    untrained = model.sample(conditioning, noise, num_denoising_steps=3, guidance_scale=3.0)
    change(trainable)
    trained = model.sample(conditioning, noise, num_denoising_steps=3, guidance_scale=3.0)
    save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path / "lora")

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None, requires_safety_checker=False)
    pipeline.load_lora_weights(tmp_path / "lora")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"latents": noise, "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
    stock = pipeline("a cat", **arguments).images
    torch.testing.assert_close(stock, trained, rtol=1e-5, atol=1e-5)
    assert (trained - untrained).abs().max() > 0.05


def test_a_saved_lora_loads_back_and_can_be_switched(tiny_sd15: Path, tmp_path: Path, base_prediction: Tensor) -> None:
    model, trainable = with_lora(tiny_sd15, alpha=8)
    change(trainable)
    save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path / "lora")
    fresh = StableDiffusion.load(str(tiny_sd15), device="cpu")
    fresh.load_tuned(tmp_path)
    torch.testing.assert_close(predict(fresh), predict(model), rtol=1e-5, atol=1e-5)
    fresh.use_tuned(False)
    assert torch.equal(predict(fresh), base_prediction)
    fresh.use_tuned(True)
    torch.testing.assert_close(predict(fresh), predict(model), rtol=1e-5, atol=1e-5)


def test_the_saved_file_holds_the_trained_weights_and_is_readable_by_others(tiny_sd15: Path, tmp_path: Path) -> None:
    model, trainable = with_lora(tiny_sd15)
    change(trainable)
    save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path)
    path = tmp_path / LORA_WEIGHTS
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    saved = load_file(path)
    assert sum(value.numel() for value in saved.values()) == sum(parameter.numel() for parameter in trainable)
    by_sum = sorted(value.double().sum().item() for value in saved.values())
    assert by_sum == pytest.approx(sorted(parameter.double().sum().item() for parameter in trainable), abs=1e-9)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("half of the layers", "layers are in either the LoRA or the model but not both"),
        ("an extra layer", "layers are in either the LoRA or the model but not both"),
        ("another shape", "have shapes that do not fit the layer"),
        ("not finite", "1 tensors must be finite floats"),
        ("no metadata", "metadata `unet.lora_alpha` must be a number"),
    ],
)
def test_fault_48_a_lora_that_does_not_fit_the_model_is_refused_by_name(
    tiny_sd15: Path, tmp_path: Path, damage: str, message: str
) -> None:
    model, _ = with_lora(tiny_sd15)
    save_lora(StableDiffusionPipeline, "unet", model.denoiser, tmp_path / LORA_DIR)
    path = tmp_path / LORA_DIR / LORA_WEIGHTS
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    first = next(name for name in sorted(tensors) if name.endswith("lora_A.weight"))
    second = first.replace("lora_A", "lora_B")
    if damage == "half of the layers":
        tensors = {name: tensors[name] for name in sorted(tensors)[: len(tensors) // 4 * 2]}
    elif damage == "an extra layer":
        tensors |= {"unet.extra.lora_A.weight": tensors[first], "unet.extra.lora_B.weight": tensors[second].clone()}
    elif damage == "another shape":
        tensors[first] = tensors[first][:, :-1].clone()
    elif damage == "not finite":
        tensors[second] = torch.full_like(tensors[second], float("nan"))
    else:
        metadata = {"format": "pt"}
    save_file({name: value.clone() for name, value in tensors.items()}, path, metadata=metadata)
    with pytest.raises(ModelError, match=rf"{LORA_WEIGHTS}: .*{message}"):
        StableDiffusion.load(str(tiny_sd15), device="cpu").load_tuned(tmp_path)


KINDS = ("to_q", "to_out.0", "proj_in", "ff.net.2", "conv1", "downsamplers.0.conv")
"""Linear layers with and without bias, and convolutions, one with a stride."""
VARIANTS = ({"use_rslora": True}, {"use_dora": True}, {"use_rslora": True, "use_dora": True})


def adapted(denoiser: nn.Module) -> dict[str, LoraLayer]:
    return {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_starts_as_the_base_model_exactly_and_is_it_when_switched_off(
    tiny_sd15: Path, variant: dict[str, bool], dtype: str
) -> None:
    base = predict_in(StableDiffusion.load(str(tiny_sd15), device="cpu", dtype=dtype))
    model, trainable = with_lora(tiny_sd15, targets=KINDS, dtype=dtype, **variant)
    adapters = Adapters(model.denoiser)
    assert torch.equal(predict_in(model), base)
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    num_layers = len(adapted(model.denoiser))
    assert len(trainable) == (3 if "use_dora" in variant else 2) * num_layers > 0
    change(trainable)
    assert not torch.allclose(predict_in(model), base, atol=1e-2)
    with adapters.off():
        assert torch.equal(predict_in(model), base)


@torch.no_grad()
def predict_in(model: StableDiffusion) -> Tensor:
    """`predict` in the dtype of the model."""
    conditioning, _ = model.encode_prompts(["a cat", "a dog"])
    noisy = noise_at((2, 4, 8, 8), 0, "noisy").to(model.dtype)
    return model.denoiser(noisy, torch.tensor([10, 900]), conditioning["prompt_embedding"]).sample


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_computes_what_peft_computes_and_has_its_gradients(tiny_sd15: Path, variant: dict[str, bool]) -> None:
    found: list[tuple[Tensor, list[Tensor | None]]] = []
    for is_peft in (True, False):
        model, trainable = with_lora(tiny_sd15, targets=KINDS, **variant)
        model.denoiser.double()
        if not is_peft:
            Adapters(model.denoiser)
        change(trainable)
        embedding = noise_at((2, 77, 32), 0, "embedding").double()
        times, noisy = torch.tensor([10, 900]), noise_at((2, 4, 8, 8), 0, "noisy").double()
        output = model.denoiser(noisy, times, embedding).sample
        output.square().mean().backward()
        found.append((output.detach(), [parameter.grad for parameter in trainable]))
    (expected, gradients), (output, own) = found
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for gradient, other in zip(gradients, own, strict=True):
        assert gradient is not None and other is not None
        torch.testing.assert_close(other, gradient, rtol=1e-9, atol=1e-9)


def test_the_norms_of_rows_equal_those_of_the_changed_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, kernel in (((6, 5), ()), ((6, 5, 3, 3), (1, 1))):
        weight = torch.randn(shape, generator=generator)
        first = torch.randn((2, *shape[1:]), generator=generator)
        second = torch.randn((6, 2, *kernel), generator=generator)
        changed = weight.double().flatten(1) + 0.7 * second.double().flatten(1) @ first.double().flatten(1)
        torch.testing.assert_close(
            row_norms(weight, first, second, 0.7), changed.norm(dim=1).float(), rtol=1e-6, atol=1e-6
        )


def test_a_change_of_16_bit_rows_that_is_smaller_than_their_rounding_is_kept(tiny_sd15: Path) -> None:
    model, _ = with_lora(tiny_sd15, targets=("to_q",), dtype="bfloat16", use_dora=True)
    Adapters(model.denoiser)
    (layer, *_), share = adapted(model.denoiser).values(), 1e-3
    inputs = torch.randn((1, 9, layer.in_features), generator=torch.Generator().manual_seed(0)).bfloat16()
    base = layer.base_layer(inputs)
    with torch.no_grad():
        layer.lora_magnitude_vector[POLICY].weight *= 1 + share
    magnitudes = layer.lora_magnitude_vector[POLICY]
    arguments = {"lora_A": layer.lora_A[POLICY], "lora_B": layer.lora_B[POLICY], "scaling": 1.0}
    added = magnitudes(inputs, **arguments, base_layer=layer.base_layer, base_result=base)
    torch.testing.assert_close(added, (share * base.float()).bfloat16(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_variant_loads_into_a_stock_pipeline_and_back(
    tiny_sd15: Path, tmp_path: Path, variant: dict[str, bool]
) -> None:
    model, trainable = with_lora(tiny_sd15, alpha=3, targets=KINDS, **variant)
    Adapters(model.denoiser)
    change(trainable)
    save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path / LORA_DIR)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd15, safety_checker=None, requires_safety_checker=False)
    pipeline.load_lora_weights(tmp_path / LORA_DIR)
    embedding = model.encode_prompts(["a cat", "a dog"])[0]["prompt_embedding"]
    with torch.no_grad():
        stock = pipeline.unet(noise_at((2, 4, 8, 8), 0, "noisy"), torch.tensor([10, 900]), embedding).sample
    torch.testing.assert_close(stock, predict(model), rtol=1e-4, atol=1e-4)
    fresh = StableDiffusion.load(str(tiny_sd15), device="cpu")
    fresh.load_tuned(tmp_path)
    torch.testing.assert_close(predict(fresh), predict(model), rtol=1e-5, atol=1e-5)
    saved = read_lora(tmp_path / LORA_DIR, "unet")
    assert saved.scale == (3 / 2 if "use_rslora" in variant else 3 / 4), "rank 4"


def test_the_magnitudes_of_a_16_bit_model_are_loaded_in_fp32(tiny_sd15: Path, tmp_path: Path) -> None:
    model, trainable = with_lora(tiny_sd15, targets=("to_q", "conv1"), dtype="bfloat16", use_dora=True)
    change(trainable)
    save_lora(model.pipeline_class, "unet", model.denoiser, tmp_path / LORA_DIR)
    fresh = StableDiffusion.load(str(tiny_sd15), device="cpu", dtype="bfloat16")
    fresh.load_tuned(tmp_path)
    trained = adapted(model.denoiser)
    for name, layer in adapted(fresh.denoiser).items():
        (found,) = layer.lora_magnitude_vector.values()
        assert torch.equal(found.weight, trained[name].lora_magnitude_vector[POLICY].weight)


def test_fault_48_magnitudes_that_do_not_fit_the_layer_are_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    model, _ = with_lora(tiny_sd15, use_dora=True)
    save_lora(StableDiffusionPipeline, "unet", model.denoiser, tmp_path / LORA_DIR)
    path = tmp_path / LORA_DIR / LORA_WEIGHTS
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = next(name for name in sorted(tensors) if name.endswith("lora_magnitude_vector"))
    save_file(tensors | {name: tensors[name][:-1].clone()}, path, metadata=metadata)
    with pytest.raises(ModelError, match="have shapes that do not fit the layer"):
        StableDiffusion.load(str(tiny_sd15), device="cpu").load_tuned(tmp_path)
    del tensors[name]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ModelError, match="must hold two factors and magnitudes per layer and nothing else"):
        StableDiffusion.load(str(tiny_sd15), device="cpu").load_tuned(tmp_path)

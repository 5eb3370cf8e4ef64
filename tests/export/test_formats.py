"""Exported files, loaded by stock diffusers, against the trained policy."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from finished_runs import change, config_of, policy_of, save_policy
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cdpo_ray.errors import ExportError
from cdpo_ray.export.formats import write_diffusers, write_merged, write_peft
from cdpo_ray.export.kohya import architecture_of, kohya_path, write_kohya
from cdpo_ray.export.trained import Trained
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS, read_lora
from cdpo_ray.randomness.noise import noise_at

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
ALL_KINDS = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut")
ALL_KINDS += ("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONVOLUTION = "up_blocks.1.resnets.0.conv1"
UNETS = ("stable_diffusion", "stable_diffusion_xl", "latent_consistency")
TRANSFORMERS = ("stable_diffusion_3", "flux", "flux2", "z_image", "qwen_image", "sana")

TinyModels = Callable[[str], Path]


def trained_lora(
    folder: Path, model_dir: Path, family: str = "stable_diffusion", *, dtype: str = "float32", **lora: Any
) -> tuple[Trained, TextToImageModel]:
    config = config_of(folder, model_dir, model={"family": family, "dtype": dtype}, training={"lora": lora})
    policy = policy_of(config)
    save_policy(policy, folder / "4-training")
    return Trained("tuned", folder / "4-training", family, {"path": str(model_dir), "dtype": dtype}), policy


def sampled(model: TextToImageModel) -> Tensor:
    conditioning, _ = model.encode_prompts(["a cat"])
    noise = noise_at(model.latent_shape(64, 64), 0, "image", "a cat", 0)[None]
    return model.sample(conditioning, noise, num_denoising_steps=3, guidance_scale=3.0)


def assert_samples_as(policy: TextToImageModel, pipeline: Any, *, atol: float = 1e-5) -> None:
    """In fp64, because random weights and guidance amplify fp32 rounding to 1e-4."""
    found, trained = (
        sampled(type(policy)(made_of.to(torch.float64), dtype=torch.float64, device="cpu"))
        for made_of in (pipeline, policy.pipeline)
    )
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=atol)
    policy.denoiser.disable_adapters()
    base = sampled(type(policy)(policy.pipeline, dtype=torch.float64, device="cpu"))
    assert (trained - base).abs().max() > 1e-2, "training must have changed the model"


@pytest.mark.parametrize(
    ("write", "family", "alpha"),
    [(write_diffusers, family, 2.0) for family in UNETS + TRANSFORMERS]
    + [(write_kohya, family, 2.0) for family in (*UNETS, "flux2", "z_image", "qwen_image")]
    + [(write, "stable_diffusion", 8.0) for write in (write_diffusers, write_kohya)],
)
def test_a_lora_file_loads_into_the_stock_pipeline_and_samples_like_the_policy_for_any_alpha(
    tiny_models: TinyModels, tmp_path: Path, write: Any, family: str, alpha: float
) -> None:
    trained, policy = trained_lora(tmp_path, tiny_models(family), family, rank=4, alpha=alpha, targets=ATTENTION)
    output = tmp_path / "out"
    output.mkdir()
    write(trained, output)
    (file,) = output.iterdir()
    pipeline = DiffusionPipeline.from_pretrained(tiny_models(family))
    pipeline.load_lora_weights(output, weight_name=file.name)
    assert_samples_as(policy, pipeline)


def test_the_stock_pipeline_reads_kohya_keys_of_every_kind_of_layer(tiny_sd15: Path, tmp_path: Path) -> None:
    trained, policy = trained_lora(tmp_path, tiny_sd15, rank=3, alpha=1.5, targets=ALL_KINDS)
    write_kohya(trained, tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd15)
    pipeline.load_lora_weights(tmp_path, weight_name="tuned.safetensors")
    assert_samples_as(policy, pipeline)


def merged_by_peft(denoiser: Any) -> dict[str, Tensor]:
    """Weights of the adapted layers, with the LoRA merged by PEFT."""
    layers = {name: layer for name, layer in denoiser.named_modules() if hasattr(layer, "lora_A")}
    for layer in layers.values():
        layer.merge()
    return {name: layer.get_base_layer().weight.detach() for name, layer in layers.items()}


RSLORA, DORA = {"use_rslora": True}, {"use_dora": True}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        *((name, RSLORA) for name in ("diffusers", "kohya", "peft", "merged")),
        *((name, RSLORA | DORA) for name in ("diffusers", "peft", "merged")),
    ],
)
def test_a_variant_has_the_policys_weights_in_every_format(
    tiny_sd15: Path, tmp_path: Path, name: str, variant: dict[str, bool]
) -> None:
    targets = ("to_q", "to_out.0", "ff.net.2", "conv1", "downsamplers.0.conv", "proj_in")
    trained, policy = trained_lora(tmp_path, tiny_sd15, rank=4, alpha=3, targets=targets, **variant)
    output = tmp_path / "out"
    output.mkdir()
    {"diffusers": write_diffusers, "kohya": write_kohya, "peft": write_peft, "merged": write_merged}[name](
        trained, output
    )
    base = DiffusionPipeline.from_pretrained(tiny_sd15)
    if name == "merged":
        found = dict(DiffusionPipeline.from_pretrained(output).unet.named_parameters())
        weights = {key.removesuffix(".weight"): value for key, value in found.items() if key.endswith(".weight")}
    elif name == "peft":
        weights = merged_by_peft(PeftModel.from_pretrained(base.unet, output).get_base_model())
    else:
        (file,) = output.iterdir()
        base.load_lora_weights(output, weight_name=file.name)
        weights = merged_by_peft(base.unet)
    before = dict(DiffusionPipeline.from_pretrained(tiny_sd15).unet.named_parameters())
    expected = merged_by_peft(policy.denoiser)
    assert {value.ndim for value in expected.values()} == {2, 4}
    for layer, value in expected.items():
        torch.testing.assert_close(weights[layer], value, rtol=1e-6, atol=1e-6)
        assert (value - before[f"{layer}.weight"]).abs().max() > 1e-2


def test_a_dora_has_no_kohya_format(tiny_sd15: Path, tmp_path: Path) -> None:
    trained, _ = trained_lora(tmp_path, tiny_sd15, rank=2, targets=("to_q",), **DORA)
    with pytest.raises(ExportError, match=r"^`--format` kohya: the LoRA is a DoRA .*; use `--format` diffusers, peft"):
        write_kohya(trained, tmp_path)


@pytest.mark.parametrize("family", UNETS + TRANSFORMERS)
def test_merged_weights_sample_like_the_policy_and_contain_no_lora(
    tiny_models: TinyModels, tmp_path: Path, family: str
) -> None:
    trained, policy = trained_lora(tmp_path, tiny_models(family), family, rank=4, alpha=2, targets=ATTENTION)
    write_merged(trained, tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name in getattr(pipeline, policy.denoiser_name).state_dict())
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any("lora" in str(path.relative_to(tmp_path)).lower() for path in files)
    assert not any(str(tiny_models(family).parent).encode() in path.read_bytes() for path in files), "no local path"
    assert_samples_as(policy, pipeline, atol=1e-4)  # the sums of weights are rounded to the file's fp32


def test_merging_includes_convolutions(tiny_sd15: Path, tmp_path: Path) -> None:
    trained, policy = trained_lora(tmp_path, tiny_sd15, rank=3, alpha=1.5, targets=ALL_KINDS)
    write_merged(trained, tmp_path / "out")
    assert_samples_as(policy, DiffusionPipeline.from_pretrained(tmp_path / "out"))


def test_merging_is_computed_in_fp32_and_rounded_once_to_the_models_type(tiny_sd15: Path, tmp_path: Path) -> None:
    trained, policy = trained_lora(tmp_path, tiny_sd15, dtype="bfloat16", rank=4, alpha=8, targets=ATTENTION)
    write_merged(trained, tmp_path / "out")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).unet.get_submodule(LINEAR)
    layer = policy.denoiser.get_submodule(LINEAR)
    down, up = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + 8 / 4 * up @ down
    assert load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")[f"{LINEAR}.weight"].dtype == (
        torch.bfloat16
    )
    assert torch.equal(merged.weight, exact.float().bfloat16())


def test_a_fully_fine_tuned_denoiser_replaces_the_bases(tiny_sd15: Path, tmp_path: Path) -> None:
    policy = load_model("stable_diffusion", path=str(tiny_sd15), device="cpu")
    base = sampled(policy)
    change(list(policy.denoiser.parameters()), size=0.02)
    policy.denoiser.save_pretrained(tmp_path / "4-training" / "unet")
    trained = Trained("tuned", tmp_path / "4-training", "stable_diffusion", {"path": str(tiny_sd15)})
    write_merged(trained, tmp_path / "out")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "out")
    made = sampled(type(policy)(merged, dtype=torch.float32, device="cpu"))
    torch.testing.assert_close(made, sampled(policy), rtol=1e-5, atol=1e-5)
    assert (made - base).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "write"), [("diffusers", write_diffusers), ("kohya", write_kohya), ("peft", write_peft)]
)
def test_lora_formats_refuse_a_fully_fine_tuned_model(tmp_path: Path, name: str, write: Any) -> None:
    (tmp_path / "unet").mkdir()
    trained = Trained("tuned", tmp_path, "stable_diffusion", {"path": "embedded"})
    with pytest.raises(ExportError, match=rf"^`--format` {name}: .* holds a full model .*; use `--format merged`$"):
        write(trained, tmp_path)


def test_kohya_keys_have_the_expected_names_and_give_the_layers_weight_change(tiny_sd15: Path, tmp_path: Path) -> None:
    trained, policy = trained_lora(tmp_path, tiny_sd15, rank=4, alpha=2, targets=ALL_KINDS)
    write_kohya(trained, tmp_path)
    file = load_file(kohya_path(tmp_path, "tuned"))
    by_hand = {
        LINEAR: "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
        CONVOLUTION: "lora_unet_up_blocks_1_resnets_0_conv1",
    }
    for layer, key in by_hand.items():
        down, up, alpha = (file[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        assert (down.shape[0], up.shape[1], alpha.shape, alpha.dtype) == (4, 4, torch.Size([]), torch.float32)
        change_of_weight = (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:]) * alpha.item() / 4
        by_peft = policy.denoiser.get_submodule(layer).get_delta_weight("default")
        torch.testing.assert_close(change_of_weight, by_peft, rtol=1e-5, atol=1e-6)
    assert file["lora_unet_up_blocks_1_resnets_0_conv1.lora_down.weight"].shape[2:] == (3, 3)
    assert file["lora_unet_up_blocks_1_resnets_0_conv1.lora_up.weight"].shape[2:] == (1, 1)
    num_layers = sum(hasattr(layer, "lora_A") for layer in policy.denoiser.modules())
    assert len(file) == 3 * num_layers > 0


def test_a_kohya_file_of_a_family_that_no_program_reads_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    trained, _ = trained_lora(tmp_path, tiny_models("sana"), "sana", rank=4, alpha=2, targets=ATTENTION)
    with pytest.raises(ExportError, match=r"kohya: no program is known to read .* 'sana'; use `--format diffusers`"):
        write_kohya(trained, tmp_path)


def weight_change(down: Tensor, up: Tensor, scale: float) -> Tensor:
    return (scale * up.double().flatten(1) @ down.double().flatten(1)).reshape(len(up), *down.shape[1:])


@pytest.mark.parametrize("family", UNETS + TRANSFORMERS)
def test_the_diffusers_file_has_the_weight_change_for_readers_that_ignore_alpha(
    tiny_models: TinyModels, tmp_path: Path, family: str
) -> None:
    trained, policy = trained_lora(tmp_path, tiny_models(family), family, rank=2, alpha=8, targets=ATTENTION)
    write_diffusers(trained, tmp_path)
    saved = load_file(trained.training_dir / LORA_DIR / LORA_WEIGHTS)
    found = load_file(tmp_path / LORA_WEIGHTS)
    layers = {name.rpartition(".lora_")[0] for name in saved}
    assert found.keys() == saved.keys() and len(layers) > 5
    for layer in layers:
        expected = weight_change(*(saved[f"{layer}.lora_{end}.weight"] for end in "AB"), 8 / 2)
        ignored = weight_change(*(found[f"{layer}.lora_{end}.weight"] for end in "AB"), 1.0)
        torch.testing.assert_close(ignored, expected, rtol=1e-6, atol=1e-6)
    (tmp_path / LORA_DIR).mkdir()
    (tmp_path / LORA_WEIGHTS).rename(tmp_path / LORA_DIR / LORA_WEIGHTS)
    folded = read_lora(tmp_path / LORA_DIR, policy.denoiser_name)
    assert (folded.alpha, folded.rank) == (2, 2)


@pytest.mark.parametrize("family", ["stable_diffusion", "flux", "flux2", "z_image", "qwen_image", "sana"])
def test_peft_loads_its_format(tiny_models: TinyModels, tmp_path: Path, family: str) -> None:
    targets = ALL_KINDS if family == "stable_diffusion" else ATTENTION
    trained, policy = trained_lora(tmp_path, tiny_models(family), family, rank=4, alpha=2, targets=targets)
    write_peft(trained, tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny_models(family).name, "no local path"
    base = getattr(DiffusionPipeline.from_pretrained(tiny_models(family)), policy.denoiser_name)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").get_base_model()
    layers = [name for name, layer in policy.denoiser.named_modules() if hasattr(layer, "lora_A")]
    assert layers == [name for name, layer in loaded.named_modules() if hasattr(layer, "lora_A")]
    for name in layers:
        found, trained_change = (
            net.get_submodule(name).get_delta_weight("default") for net in (loaded, policy.denoiser)
        )
        assert torch.equal(found, trained_change) and found.abs().max() > 0


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("stable_diffusion", ("stable-diffusion-v1/lora", "sd_v1", "epsilon", "512x512", "False")),
        ("latent_consistency", ("stable-diffusion-v1/lora", "sd_v1", "epsilon", "512x512", "False")),
        (
            "stable_diffusion_xl",
            ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "epsilon", "1024x1024", "False"),
        ),
        ("stable_diffusion_3", ("stable-diffusion-3-5-medium/lora", "sd3", None, "1024x1024", "False")),
        ("flux", ("flux-1-dev/lora", "flux1", None, "1024x1024", "False")),
        ("flux_schnell", ("flux-1-schnell/lora", "flux1", None, "1024x1024", "False")),
        ("flux2", ("Flux.2-klein-4b/lora", "flux_2_klein_4b", None, "1024x1024", "False")),
        ("z_image", ("Z-Image/lora", "z_image", None, "1024x1024", "False")),
        ("qwen_image", ("Qwen-Image/lora", "qwen_image", None, "1328x1328", "False")),
    ],
)
def test_the_metadata_of_a_kohya_file_names_the_base_model(
    tiny_models: TinyModels, tmp_path: Path, family: str, expected: tuple[str | None, ...]
) -> None:
    name = family.removesuffix("_schnell")
    trained, _ = trained_lora(tmp_path, tiny_models(family), name, rank=4, alpha=2, targets=ATTENTION)
    write_kohya(replace(trained, created="2026-11-27T10:00:00+00:00"), tmp_path)
    with safe_open(kohya_path(tmp_path, "tuned"), framework="pt") as file:
        found = file.metadata()
    keys = ("architecture", "prediction_type", "resolution")
    spec, prediction, resolution = (found.get(f"modelspec.{key}") for key in keys)
    assert (spec, found["ss_base_model_version"], prediction, resolution, found["ss_v2"]) == expected
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2.0")
    assert found["modelspec.sai_model_spec"] == "1.0.0" and found["modelspec.date"] == "2026-11-27T10:00:00+00:00"
    assert found["modelspec.title"] == found["ss_output_name"] == "tuned"
    assert str(tiny_models(family).parent) not in str(found), "no local path"


def test_stable_diffusion_2_is_recognized_by_its_text_width_and_prediction_type(tmp_path: Path) -> None:
    for part, config in {
        "unet": {"cross_attention_dim": 1024},
        "scheduler": {"prediction_type": "v_prediction"},
    }.items():
        (tmp_path / part).mkdir()
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (tmp_path / part / file).write_text(json.dumps(config))
    found = architecture_of(Trained("tuned", tmp_path, "stable_diffusion", {"path": str(tmp_path)}))
    assert found[:2] == ("stable-diffusion-v2-768-v", "sd_v2_v")
    assert (found.size, found.prediction_type) == (768, "v")

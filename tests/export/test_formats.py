"""Exported files, loaded by stock diffusers, against the trained policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from finished_runs import change, config_of, policy_of, save_policy
from safetensors.torch import load_file
from torch import Tensor

from cdpo_ray.errors import ExportError
from cdpo_ray.export.formats import Trained, kohya_path, write_diffusers, write_kohya, write_merged
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS
from cdpo_ray.randomness.noise import noise_at

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ALL_KINDS = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut")
ALL_KINDS += ("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")
LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONVOLUTION = "up_blocks.1.resnets.0.conv1"
UNETS = ("stable_diffusion", "stable_diffusion_xl", "latent_consistency")
TRANSFORMERS = ("stable_diffusion_3", "flux")

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
    + [(write_kohya, family, 2.0) for family in UNETS]
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


@pytest.mark.parametrize("family", UNETS + TRANSFORMERS)
def test_merged_weights_sample_like_the_policy_and_contain_no_lora(
    tiny_models: TinyModels, tmp_path: Path, family: str
) -> None:
    trained, policy = trained_lora(tmp_path, tiny_models(family), family, rank=4, alpha=2, targets=ATTENTION)
    write_merged(trained, tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name in getattr(pipeline, policy.denoiser_name).state_dict())
    assert not any("lora" in str(path).lower() for path in (tmp_path / "out").rglob("*"))
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


@pytest.mark.parametrize(("name", "write"), [("diffusers", write_diffusers), ("kohya", write_kohya)])
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


@pytest.mark.parametrize(
    ("family", "layer", "key"),
    [
        ("stable_diffusion_3", "transformer_blocks.0.attn.to_q", "lora_transformer_transformer_blocks_0_attn_to_q"),
        (
            "flux",
            "single_transformer_blocks.0.attn.to_v",
            "lora_transformer_single_transformer_blocks_0_attn_to_v",
        ),
    ],
)
def test_kohya_keys_of_a_transformer_are_those_that_comfyui_reads(
    tiny_models: TinyModels, tmp_path: Path, family: str, layer: str, key: str
) -> None:
    trained, policy = trained_lora(tmp_path, tiny_models(family), family, rank=4, alpha=2, targets=ATTENTION)
    write_kohya(trained, tmp_path)
    file = load_file(kohya_path(tmp_path, "tuned"))
    change_of_weight = file[f"{key}.lora_up.weight"] @ file[f"{key}.lora_down.weight"] * file[f"{key}.alpha"] / 4
    by_peft = policy.denoiser.get_submodule(layer).get_delta_weight("default")
    torch.testing.assert_close(change_of_weight, by_peft, rtol=1e-5, atol=1e-6)


def test_the_diffusers_file_is_the_trained_one_byte_for_byte(tiny_sd15: Path, tmp_path: Path) -> None:
    trained, _ = trained_lora(tmp_path, tiny_sd15, rank=2, alpha=8, targets=ATTENTION)
    write_diffusers(trained, tmp_path)
    saved = trained.training_dir / LORA_DIR / LORA_WEIGHTS
    assert (tmp_path / LORA_WEIGHTS).read_bytes() == saved.read_bytes()

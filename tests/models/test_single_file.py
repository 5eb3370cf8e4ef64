"""Single-file checkpoints of Stable Diffusion and SDXL: the same model as the folder, or refused by name."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from original_names import original_weights, write_single_file
from tiny_models import build_tiny_sd15, build_tiny_sdxl, tiny_clip_config, tiny_tokenizer
from torch import Tensor
from transformers import CLIPTextModel

from cdpo_ray.errors import ModelError
from cdpo_ray.models import load_model
from cdpo_ray.models.folder import check_single_file, fitting_families
from cdpo_ray.randomness.noise import noise_at

FAMILIES = {"sd1": "stable_diffusion", "sd2": "stable_diffusion", "sdxl": "stable_diffusion_xl"}
PROMPTS = ["a red cube", "a bear"]

Weights = dict[str, Tensor]
Write = Callable[[Mapping[str, Tensor]], Path]


def sd2_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        cross_attention_dim=48,
        attention_head_dim=(4, 8, 8, 8),
        use_linear_projection=True,
    )


def build_tiny_sd2(folder: Path) -> Path:
    """Stable Diffusion 2.1 as published: 23 of open_clip's 24 text layers, linear projections, v prediction; narrow."""
    build_tiny_sd15(folder, prediction_type="v_prediction", build_unet=sd2_unet)
    config = tiny_clip_config(tiny_tokenizer(), channels=48)
    config.num_hidden_layers, config.hidden_act = 23, "gelu"
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of file -> tiny model in diffusers layout."""
    build = {"sd1": build_tiny_sd15, "sd2": build_tiny_sd2, "sdxl": build_tiny_sdxl}
    return {kind: each(tmp_path_factory.mktemp(kind) / "model") for kind, each in build.items()}


@pytest.fixture(scope="module")
def originals(folders: dict[str, Path]) -> dict[str, Weights]:
    """Kind of file -> its weights."""
    return {kind: original_weights(folder, kind) for kind, folder in folders.items()}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return lambda weights: write_single_file(weights, tmp_path / "model.safetensors")


def load(kind: str, path: Path, config: Path, **options: Any) -> Any:
    return load_model(FAMILIES[kind], path=str(path), config={"path": str(config)}, device="cpu", **options)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_file_is_the_same_model_as_the_folder(
    kind: str, folders: dict[str, Path], originals: dict[str, Weights], write: Write
) -> None:
    model = load(kind, write(originals[kind]), folders[kind])
    expected = load_model(FAMILIES[kind], path=str(folders[kind]), device="cpu")
    for name in ("unet", "vae", *model.text_encoders):
        found, stock = (getattr(each.pipeline, name).state_dict() for each in (model, expected))
        assert list(found) == list(stock)
        assert all(torch.equal(found[key], stock[key]) for key in stock), name
    assert not any(part.training for part in (model.denoiser, model.pipeline.vae, model.pipeline.text_encoder))
    noise = noise_at((2, 4, 8, 8), 0, "noise")
    images = [
        each.decode(each.sample(each.encode_prompts(PROMPTS)[0], noise, num_denoising_steps=3, guidance_scale=5.0))
        for each in (model, expected)
    ]
    assert (images[0].int() - images[1].int()).abs().max() <= 1  # weights lie at other addresses


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_file_of_another_dtype_is_converted_and_training_leaves_out_the_vae(
    kind: str, folders: dict[str, Path], originals: dict[str, Weights], write: Write
) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in originals[kind].items()}
    model = load(kind, write(half), folders[kind], dtype="bfloat16", for_training=True)
    assert model.pipeline.vae is None
    assert {value.dtype for value in model.denoiser.parameters()} == {torch.bfloat16}


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if not key.endswith(name)}


def plus(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sd1", without("input_blocks.0.0.bias"), r"unet/ lacks 1 weights of UNet2D.*the first conv_in\.bias"),
        ("sd1", without("encoder.mid.attn_1.q.weight"), r"vae/ lacks 1 weights of AutoencoderKL"),
        ("sd1", without("layers.0.mlp.fc1.weight"), r"text_encoder/ lacks 1 weights of CLIPTextModel"),
        ("sd2", without("resblocks.0.attn.in_proj_bias"), r"text_encoder/ lacks 3 weights of CLIPTextModel"),
        ("sdxl", without("text_projection"), r"text_encoder_2/ lacks 1 weights .* text_projection\.weight"),
        ("sdxl", without("label_emb.0.0.weight"), r"cannot be loaded: KeyError: 'label_emb\.0\.0\.weight'"),
        ("sd1", plus("model.diffusion_model.motion.weight", 1), r"unet/ has 1 weights .*motion\.weight"),
        ("sd1", plus("model.diffusion_model.input_blocks.1.0.x", 1), r"unet/ has \d weights"),
        ("sd1", plus("first_stage_model.encoder.extra", 1), r"vae/ has 1 weights .*encoder\.extra"),
        ("sd1", plus("cond_stage_model.transformer.text_model.extra", 1), r"text_encoder/ has \d weights"),
        ("sd2", plus("cond_stage_model.model.extra", 1), r"text_encoder/ has 1 weights .*model\.extra"),
        ("sd1", plus("first_stage_model.quant_conv.bias", 3), r"vae: quant_conv\.bias is of shape \[3\], not \[8\]"),
        ("sd1", plus("control_model.x", 1), r"it has 1 weights that no part of Stable Diffusion 1 has, .*control_m"),
        ("sdxl", plus("edm_mean", 4), r"it has 1 weights that no part of SDXL has, the first \"edm_mean\""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_fault_37_missing_unexpected_and_unused_weights_of_a_file_are_named(
    kind: str,
    change: Callable[[Weights], Weights],
    message: str,
    folders: dict[str, Path],
    originals: dict[str, Weights],
    write: Write,
) -> None:
    path = write(change(originals[kind]))
    with pytest.raises(ModelError, match=rf"^`model\.path` {path}.*{message}"):
        load(kind, path, folders[kind])


def test_a_file_without_configurations_is_refused(originals: dict[str, Weights], write: Write) -> None:
    with pytest.raises(ModelError, match="a single file needs `config`"):
        load_model("stable_diffusion", path=str(write(originals["sd1"])), device="cpu")


def test_the_families_that_a_file_fits_are_found_by_its_names(originals: dict[str, Weights], write: Write) -> None:
    for kind, weights in originals.items():
        assert fitting_families(write(weights)) == [FAMILIES[kind]]
    assert fitting_families(write({"x": torch.zeros(1)})) == []


def test_fault_37_a_file_of_another_family_or_architecture_is_refused(
    folders: dict[str, Path], originals: dict[str, Weights], write: Write
) -> None:
    path = write(originals["sdxl"])
    with pytest.raises(ModelError, match=r"fit `model\.family` stable_diffusion: it holds SDXL; it fits .*_xl$"):
        check_single_file("stable_diffusion", path, None)
    path = write(originals["sd2"])
    with pytest.raises(
        ModelError,
        match=r"`cross_attention_dim` 48, unet/config.json .* has 32 .*give as .* the Stable Diffusion 2",
    ):
        check_single_file("stable_diffusion", path, folders["sd1"])
    nine = originals["sd1"] | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}
    with pytest.raises(ModelError, match=r"its UNet has `in_channels` 9, .* has 4 \(inpainting"):
        check_single_file("stable_diffusion", write(nine), folders["sd1"])
    with pytest.raises(ModelError, match=r"(?s)`model\.config\.path` .*it fits .* stable_diffusion$"):
        check_single_file("stable_diffusion_xl", write(originals["sdxl"]), folders["sd1"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lora_unet_x.lora_down.weight": torch.zeros(1)}, "it holds a LoRA, not a model"),
        ({"double_blocks.0.x": torch.zeros(1)}, r"lacks weights .*model\.diffusion_model\. and first_stage_model\."),
        ({"model.diffusion_model.x": torch.zeros(1)}, r"lacks weights whose names start with first_stage_model\.;"),
        (
            {"model.diffusion_model.x": torch.zeros(1), "first_stage_model.x": torch.zeros(1)},
            r"start with those of a text encoder: cond_stage_model\.model\. or",
        ),
    ],
    ids=["lora", "flux", "unet", "no text encoder"],
)
def test_fault_37_a_file_without_all_parts_is_refused(weights: Weights, message: str, write: Write) -> None:
    with pytest.raises(ModelError, match=message):
        check_single_file("stable_diffusion", write(weights), None)


def header(content: bytes, num_bytes: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if num_bytes is None else num_bytes) + content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole safetensors file"),
        (b"PK\x03\x04 a pickled checkpoint", r"its header must not have more than"),
        (header(b"{", 2**62), r"its header must not have more than 16,777,216 bytes"),
        (header(b"[]"), "is not a whole safetensors file"),
        (header(b"{}", 400), "is not a whole safetensors file"),
        (header(json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()), "not a whole"),
        (header(json.dumps({"\x1b[31m": {"dtype": "F3", "shape": [9]}}).encode()), r"not a whole [ -~]*$"),
    ],
    ids=range(7),
)  # fmt: skip
def test_fault_37_damaged_and_oversized_headers_are_reported_in_one_line(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=rf"^`model\.path` {path}: .*{message}"):
        check_single_file("stable_diffusion", path, None)


def test_a_file_that_states_v_prediction_and_zero_terminal_snr_is_sampled_by_them(
    folders: dict[str, Path], originals: dict[str, Weights], write: Write
) -> None:
    flags = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    path = write(originals["sdxl"] | flags)
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    expected = {"prediction_type": "v_prediction", **zero_snr}
    assert check_single_file("stable_diffusion_xl", path, folders["sdxl"]) == expected
    model = load("sdxl", path, folders["sdxl"])
    assert model.prediction_type == "v_prediction" and isinstance(model.pipeline.scheduler, DDIMScheduler)
    assert model.alphas_cumprod[-1] == 0 and model.sampler_timesteps(4) == (999, 749, 499, 249)
    path = write(originals["sdxl"] | {"ztsnr": torch.empty(0)})
    with pytest.raises(ModelError, match=r'`prediction_type` must be "v_prediction" \(a zero-terminal-SNR'):
        check_single_file("stable_diffusion_xl", path, folders["sdxl"])
    path = write(originals["sdxl"] | {"v_pred": torch.empty(0)})
    assert check_single_file("stable_diffusion_xl", path, None) == {"prediction_type": "v_prediction"}

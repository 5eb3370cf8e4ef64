"""The table of published models against independent figures, and the lookup of models."""

import json
from pathlib import Path

import pytest
import yaml

from cdpo_ray.cost.published import known_footprint, published_footprint

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "side", "teraflops"),
    [("sd15", 64, 0.803), ("sdxl", 128, 6.76), ("sd35_medium", 128, 11.25), ("flux_dev", 128, 74.4)],
)
def test_a_forward_pass_has_the_known_flops(name: str, side: int, teraflops: float) -> None:
    assert published_footprint(name).forward_flops(side * side) / 1e12 == pytest.approx(teraflops, rel=0.002)


@pytest.mark.parametrize(
    ("name", "teraflops"), [("sd15", 0.975), ("sdxl", 7.74), ("sd35_medium", 17.5), ("flux_dev", 96.6)]
)
def test_a_backward_pass_of_a_lora_has_the_known_flops(name: str, teraflops: float) -> None:
    footprint = published_footprint(name)
    found = footprint.backward_flops["lora"](footprint.native_positions) / 1e12
    assert found == pytest.approx(teraflops, rel=0.002)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("sd15", 859_520_964),
        ("sd21", 865_910_724),
        ("sdxl", 2_567_463_684),
        ("flux_dev", 11_901_408_320),
        ("flux2_klein_4b", (7_751_105_712 - 16_560) // 2),  # the published 16-bit file, without its header
        ("qwen_image", 40_860_802_176 // 2),  # bytes of the published bf16 weights
    ],
)
def test_a_denoiser_has_its_published_number_of_parameters(name: str, parameters: int) -> None:
    assert published_footprint(name).parameters == parameters


def test_models_have_as_many_billions_of_parameters_as_they_are_published_with() -> None:
    z_image, klein = published_footprint("z_image"), published_footprint("flux2_klein_4b")
    assert z_image.parameters / 1e9 == pytest.approx(6.15, abs=0.005)
    assert 2 * klein.text_parameters / 1e9 == pytest.approx(4.97 + 3.08, abs=0.01), "both files of the text encoder"


def test_a_vae_has_the_known_flops() -> None:
    footprint = published_footprint("sd15")
    assert footprint.encode_flops(64 * 64) / 1e12 == pytest.approx(1.12, rel=0.01)
    assert footprint.decode_flops(64 * 64) / 1e12 == pytest.approx(2.52, rel=0.01)
    assert footprint.vae_parameters == 83_653_863


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_model_of_every_shipped_config_is_in_the_table(path: Path) -> None:
    model = yaml.safe_load(path.read_text())["model"]
    found = known_footprint(model.get("family", "stable_diffusion"), model["path"])
    assert found and not found.is_assumed


def test_an_unknown_hub_model_is_assumed_to_be_its_familys_and_reported_as_such() -> None:
    found = known_footprint("stable_diffusion_xl", "someone/their-model")
    assert found and found.is_assumed and found.footprint == published_footprint("sdxl")
    assert found.source == "assumed to be as large as sdxl"


def test_a_folder_is_known_only_by_a_published_architecture(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    config = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "attention_head_dim": 8}
    config["block_out_channels"] = [320, 640, 1280, 1280]
    (unet / "config.json").write_text(json.dumps(config))
    found = known_footprint("stable_diffusion", str(tmp_path))
    assert found and found.source == "the architecture of sd15"
    (unet / "config.json").write_text(json.dumps(config | {"block_out_channels": [32, 64, 64, 64]}))
    assert known_footprint("stable_diffusion", str(tmp_path)) is None

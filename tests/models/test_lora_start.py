"""A LoRA of another program is the policy's start, with its own weight change."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_runs import change
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdpo_ray.config.training import LoraSection
from cdpo_ray.errors import ModelError
from cdpo_ray.export.formats import write_diffusers, write_peft
from cdpo_ray.export.kohya import write_kohya
from cdpo_ray.export.trained import Trained
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS, attach_lora, save_lora
from cdpo_ray.models.lora_start import check_start, convert_lora
from cdpo_ray.policy.policy import make_policy

TinyModels = Callable[[str], Path]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WITH_CONVOLUTIONS = (*ATTENTION, "conv1", "ff.net.2", "proj_in")


def load(folder: Path, family: str) -> TextToImageModel:
    return load_model(family, path=str(folder), device="cpu", for_training=True)


def given(folder: Path, model_dir: Path, family: str, writer: str, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """Write a LoRA of rank 4 in a format; the weight change of each layer, by PEFT."""
    model = load(model_dir, family)
    change(attach_lora(model.denoiser, rank=4, alpha=6, targets=targets, seed=0))
    save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, folder / "4-training" / LORA_DIR)
    trained = Trained("given", folder / "4-training", family, {"path": str(model_dir)})
    (folder / "given").mkdir()
    {"diffusers": write_diffusers, "kohya": write_kohya, "peft": write_peft}[writer](trained, folder / "given")
    return changes(model)


def changes(model: TextToImageModel) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in model.denoiser.named_modules() if hasattr(layer, "lora_A")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


@pytest.mark.parametrize(
    ("family", "writer", "targets"),
    [
        ("stable_diffusion", "diffusers", WITH_CONVOLUTIONS),
        ("stable_diffusion", "kohya", WITH_CONVOLUTIONS),
        ("stable_diffusion", "peft", WITH_CONVOLUTIONS),
        ("stable_diffusion_xl", "diffusers", ATTENTION),
        ("stable_diffusion_xl", "kohya", ATTENTION),
        ("flux", "diffusers", ATTENTION),
    ],
)
def test_the_policy_starts_with_the_weight_change_of_the_file(
    tiny_models: TinyModels, tmp_path: Path, family: str, writer: str, targets: tuple[str, ...]
) -> None:
    expected = given(tmp_path, tiny_models(family), family, writer, targets)
    model = load(tiny_models(family), family)
    lora = LoraSection(rank=4, alpha=2, targets=targets)
    make_policy(model, lora, start_from=str(tmp_path / "given"), reference="start")
    found = changes(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
        assert value.abs().max() > 1e-3


def test_each_layer_of_a_kohya_file_has_its_own_alpha(tiny_sd15: Path, tmp_path: Path) -> None:
    expected = given(tmp_path, tiny_sd15, "stable_diffusion", "kohya", ("to_q", "conv1"))
    path = tmp_path / "given" / "given.safetensors"
    tensors = load_file(path)
    names = sorted(name for name in tensors if name.endswith(".alpha"))
    factors = {name: 1.0 + number % 3 for number, name in enumerate(names)}
    save_file(tensors | {name: tensors[name] * factor for name, factor in factors.items()}, path)
    model = load(tiny_sd15, "stable_diffusion")
    make_policy(model, LoraSection(rank=4, targets=("to_q", "conv1")), start_from=str(path))
    for name, value in changes(model).items():
        factor = factors[f"lora_unet_{name.replace('.', '_')}.alpha"]
        torch.testing.assert_close(value, factor * expected[name], rtol=1e-6, atol=1e-6)


def test_the_scale_in_the_metadata_of_a_run_s_own_lora_is_used(tiny_sd15: Path, tmp_path: Path) -> None:
    expected = given(tmp_path, tiny_sd15, "stable_diffusion", "diffusers", ("to_q",))
    model = load(tiny_sd15, "stable_diffusion")
    own = tmp_path / "4-training" / LORA_DIR
    make_policy(model, LoraSection(rank=4, targets=("to_q",), use_dora=True), start_from=str(own))
    for name, value in changes(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
        layer: Any = model.denoiser.get_submodule(name)
        rows = (layer.get_base_layer().weight + value).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight, rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("writer", ["diffusers", "kohya", "peft"])
def test_a_lora_of_any_format_becomes_a_run_s_own_with_the_same_weight_change(
    writer: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    expected = given(tmp_path, tiny_sd15, "stable_diffusion", writer, WITH_CONVOLUTIONS)
    convert(tmp_path / "given", tiny_sd15, tmp_path / "own")
    model = load(tiny_sd15, "stable_diffusion")
    model.load_tuned(tmp_path / "own")
    found = {name: layer for name, layer in model.denoiser.named_modules() if hasattr(layer, "lora_A")}
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        (adapter,) = layer.lora_A
        assert torch.allclose(layer.get_delta_weight(adapter), expected[name], rtol=1e-4, atol=1e-6)


def convert(path: Path, model_dir: Path, folder: Path) -> None:
    key = "`judge.candidates.mine.adapter`"
    convert_lora(str(path), "stable_diffusion", str(model_dir), None, folder / LORA_DIR, key=key)


def test_an_adapter_that_does_not_fit_is_refused_by_its_key(tiny_models: TinyModels, tmp_path: Path) -> None:
    given(tmp_path, tiny_models("stable_diffusion_xl"), "stable_diffusion_xl", "kohya", ATTENTION)
    with pytest.raises(ModelError, match=r"^`judge\.candidates\.mine\.adapter` .*given.*; "):
        convert(tmp_path / "given", tiny_models("stable_diffusion"), tmp_path / "own")


@pytest.fixture(scope="module")
def kohya(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    given(folder, tiny_sd15, "stable_diffusion", "kohya", (*ATTENTION, "ff.net.2"))
    return folder / "given" / "given.safetensors"


def refused(path: Path, model_dir: Path, **lora: Any) -> str:
    with pytest.raises(ModelError, match=r"training\.start_from") as caught:
        check_start(str(path), "stable_diffusion", {"path": str(model_dir)}, LoraSection(**lora))
    return str(caught.value)


@pytest.mark.parametrize("lora", [{"rank": 8, "targets": (*ATTENTION, "ff.net.2")}, {"rank": 4}])
def test_other_ranks_and_layers_are_refused_with_the_settings_that_fit(
    tiny_sd15: Path, kohya: Path, lora: dict[str, Any]
) -> None:
    message = refused(kohya, tiny_sd15, **lora)
    fits = "set `training.lora.rank` to 4 and `training.lora.targets` to [net.2, to_k, to_out.0, to_q, to_v]"
    assert message.endswith(fits)
    check_start(
        str(kohya),
        "stable_diffusion",
        {"path": str(tiny_sd15)},
        LoraSection(rank=4, targets=("net.2", "to_k", "to_out.0", "to_q", "to_v")),
    )


def test_fault_48_a_start_that_cannot_be_used_is_refused(tiny_sd15: Path, kohya: Path, tmp_path: Path) -> None:
    tensors, path = load_file(kohya), tmp_path / "given.safetensors"
    first = min(name for name in tensors if name.endswith("lora_down.weight"))
    layer = first.removesuffix(".lora_down.weight")
    changed = {
        "is a DoRA": {f"{layer}.dora_scale": torch.ones(4)},
        "1 tensors are not finite floats": {first: torch.full_like(tensors[first], float("nan"))},
        "also changes text_encoder": {
            f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.{end}": tensors[f"{layer}.{end}"].clone()
            for end in ("lora_down.weight", "lora_up.weight", "alpha")
        },
    }
    for message, values in changed.items():
        save_file(tensors | values, path)
        assert message in refused(path, tiny_sd15, rank=4, targets=(*ATTENTION, "ff.net.2"))
    path.write_bytes(b"\x80\x04pickle")
    assert "cannot be read" in refused(path, tiny_sd15, rank=4)
    save_file({"a": torch.ones(1)}, path)
    refused(path, tiny_sd15, rank=4)
    save_file(tensors, tmp_path / "another.safetensors")
    assert "is a folder with 2 safetensors files" in refused(tmp_path, tiny_sd15, rank=4)


def test_untrusted_metadata_of_a_start_is_refused(tiny_sd15: Path, tmp_path: Path) -> None:
    given(tmp_path, tiny_sd15, "stable_diffusion", "diffusers", ("to_q",))
    path = tmp_path / "given" / LORA_WEIGHTS
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    for changed in ({"unet.lora_alpha": 0}, {"unet.lora_alpha": "1"}, {"unet.alpha_pattern": {"to_q": 2}}):
        save_file(tensors, path, metadata={"lora_adapter_metadata": json.dumps(metadata | changed)})
        refused(path, tiny_sd15, rank=4, targets=("to_q",))

"""Model folders with custom code: required code is refused by name, and no code runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.errors import ModelError
from cdpo_ray.models import load_model


@pytest.fixture
def folder(tiny_sd15: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd15, tmp_path / "model"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Folder that the code would create."""
    return tmp_path / "ran"


def add_code(path: Path, canary: Path) -> None:
    path.write_text(
        "import pathlib\n"
        f"pathlib.Path({str(canary)!r}).mkdir(exist_ok=True)\n"
        "from diffusers import StableDiffusionPipeline, UNet2DConditionModel\n"
        "class EvilUNet(UNet2DConditionModel): pass\n"
        "class EvilPipeline(StableDiffusionPipeline): pass\n"
    )


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def component_in_its_folder(folder: Path, canary: Path) -> None:
    add_code(folder / "unet" / "evil.py", canary)
    change(folder / "model_index.json", unet=["evil", "EvilUNet"])


def pipeline_in_the_folder(folder: Path, canary: Path) -> None:
    add_code(folder / "evil.py", canary)
    change(folder / "model_index.json", _class_name=["evil", "EvilPipeline"])


def code_named_like_a_library(folder: Path, canary: Path) -> None:
    add_code(folder / "unet" / "diffusers.py", canary)


def unknown_library(folder: Path, canary: Path) -> None:
    change(folder / "model_index.json", unet=["evil_library", "EvilUNet"])


def library_without_models(folder: Path, canary: Path) -> None:
    change(folder / "model_index.json", unet=["subprocess", "Popen"])


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (component_in_its_folder, "requires custom code, unet/evil.py, which is not run"),
        (pipeline_in_the_folder, "requires custom code, evil.py, which is not run"),
        (code_named_like_a_library, "requires custom code, unet/diffusers.py, which is not run"),
        (unknown_library, "must be of diffusers or transformers, got evil_library"),
        (library_without_models, "must be of diffusers or transformers, got subprocess.Popen"),
    ],
)
def test_fault_23_custom_code_that_a_pipeline_requires_is_refused_by_name_and_does_not_run(
    corrupt: Callable[[Path, Path], None], reason: str, folder: Path, canary: Path
) -> None:
    corrupt(folder, canary)
    with pytest.raises(ModelError, match=rf"`model\.path` {folder}.*{reason}"):
        load_model("stable_diffusion", path=str(folder), device="cpu")
    assert not canary.exists()


def test_fault_23_code_beside_a_stock_pipeline_does_not_run(folder: Path, canary: Path) -> None:
    for path in ("pipeline.py", "unet/evil.py", "text_encoder/evil.py"):
        add_code(folder / path, canary)
    change(folder / "unet" / "config.json", auto_map={"AutoModel": "evil.EvilUNet"})
    change(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.EvilUNet", "AutoConfig": "evil.E"})
    model = load_model("stable_diffusion", path=str(folder), device="cpu")
    assert type(model.denoiser).__module__.startswith("diffusers.")
    assert not canary.exists()

"""The configurations for 24 GB, end to end at tiny size: quantised, offloaded, 8-bit AdamW."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cdpo_ray.config import Config, load_config
from cdpo_ray.errors import ConfigError
from cdpo_ray.run import run_steps
from cdpo_ray.steps import STEPS
from cdpo_ray.store import read_json

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = {
    "prompts.train": {"source": "animals", "count": 2},
    "prompts.heldout": {"source": "scenes", "count": 1},
    "model.revision": None,
    "model.compile": False,
    "generation.images_per_prompt": 3,
    "generation.num_denoising_steps": 2,
    "generation.height": 64,
    "generation.width": 64,
    "rewards": {"names": ["jpeg_size"]},
    "curriculum.num_stages": 2,
    "curriculum.updates_per_stage": 1,
    "training.global_batch_size": 4,
    "evaluation.images_per_prompt": 1,
    "evaluation.judges": ["jpeg_size"],
    "evaluation.num_bootstrap_resamples": 200,
    "resources.generators": {},
    "resources.trainers": {},
}
FAMILIES = {"sdxl_24gb": "stable_diffusion_xl", "flux_24gb": "flux"}


def tiny(name: str, model_dir: Path, run_dir: Path) -> Config:
    values = TINY | {"model.path": str(model_dir), "run.dir": str(run_dir)}
    return load_config(CONFIGS / f"{name}.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_for_24_gb_runs_from_prompts_to_metrics(
    name: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    run = run_steps(tiny(name, tiny_models(FAMILIES[name]), tmp_path), STEPS)
    factors = load_file(run.step("4-training") / "lora" / "pytorch_lora_weights.safetensors")
    assert max(float(value.abs().max()) for key, value in factors.items() if "lora_B" in key) > 0
    assert read_json(run.step("5-evaluation") / "metrics.json")["num_prompts"] == 1


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sdxl_24gb", "`training.optimizer` adamw_8bit"),
        ("flux_24gb", "`model.quantization` nf4, `training.optimizer` adamw_8bit"),
    ],
)
def test_without_bitsandbytes_a_configuration_for_24_gb_is_refused_before_anything_is_made(
    name: str, keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(f'{keys}: bitsandbytes is not installed; pip install "cdpo_ray')):
        run_steps(load_config(CONFIGS / f"{name}.yaml", [f"run.dir={tmp_path / 'runs'}"]), STEPS)
    assert not (tmp_path / "runs").exists()

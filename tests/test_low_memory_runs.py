"""The configurations for 24 GB, end to end at tiny size: quantised, offloaded, 8-bit AdamW."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from cdpo_ray.config import load_config
from cdpo_ray.run import run_steps
from cdpo_ray.session import ray_session
from cdpo_ray.steps import STEPS
from cdpo_ray.store import read_json

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = {
    "prompts.train": {"source": "animals", "count": 3},
    "prompts.heldout": {"source": "scenes", "count": 2},
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


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("family", ["stable_diffusion_xl", "flux"])
def test_a_configuration_for_24_gb_runs_from_prompts_to_metrics(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    name = {"stable_diffusion_xl": "sdxl_24gb", "flux": "flux_24gb"}[family]
    values = TINY | {"model.path": str(tiny_models(family)), "run.dir": str(tmp_path)}
    config = load_config(CONFIGS / f"{name}.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])
    with ray_session():
        run = run_steps(config, STEPS)
    factors = load_file(run.step("4-training") / "lora" / "pytorch_lora_weights.safetensors")
    assert max(float(value.abs().max()) for key, value in factors.items() if "lora_B" in key) > 0
    assert read_json(run.step("5-evaluation") / "metrics.json")["num_prompts"] == 2

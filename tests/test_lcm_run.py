"""The whole way on a real local Ray with a latent consistency model, from generation to a LoRA loaded back."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from PIL import Image

from cdpo_ray.config import Config, validate
from cdpo_ray.models.latent_consistency import LatentConsistency
from cdpo_ray.models.seeds import noise_at
from cdpo_ray.run import run_steps, write_reports
from cdpo_ray.session import ray_session
from cdpo_ray.steps import STEPS
from cdpo_ray.store import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LORA = ["to_q", "to_out.0", "conv1", "conv_shortcut", "downsamplers.0.conv", "time_emb_proj"]


@pytest.fixture(scope="module")
def finished(tiny_lcm: Path, tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunFolder]:
    values = {
        "run": {"name": "lcm", "dir": str(tmp_path_factory.mktemp("runs")), "seed": 3},
        "prompts": {"train": {"source": "animals", "count": 3}, "heldout": {"source": "scenes", "count": 2}},
        "model": {"family": "latent_consistency", "path": str(tiny_lcm), "teacher": {"path": str(tiny_sd15)}},
        "generation": {
            "images_per_prompt": 3,
            "num_denoising_steps": 2,
            "guidance_scale": 8.0,
            "images_per_batch": 3,
        },
        "rewards": {"names": ["jpeg_size"]},
        "curriculum": {"num_stages": 2, "updates_per_stage": 2},
        "training": {
            "beta": 400,
            "learning_rate": 1e-3,
            "global_batch_size": 2,
            "empty_prompt_fraction": 0.25,
            "lora": {"rank": 4, "targets": LORA},
        },
        "evaluation": {"images_per_prompt": 2, "judges": ["jpeg_size"], "num_bootstrap_resamples": 200},
    }
    config = validate(values, where="test")
    with ray_session():
        run = run_steps(config, STEPS)
    write_reports(config)
    return config, run


def test_every_step_is_complete_and_training_begins_at_ln_2(finished: tuple[Config, RunFolder]) -> None:
    config, run = finished
    for step in STEPS:
        inputs = {folder: run.fingerprint(folder) for folder in step.inputs}
        assert run.is_complete(step.folder, step.settings(config), inputs)
    updates = [json.loads(line) for line in (run.step("4-training") / "updates.jsonl").read_text().splitlines()]
    assert [update["stage"] for update in updates] == [1, 1, 2, 2]
    assert updates[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert updates[0]["margin"] == 0 != updates[-1]["margin"]
    assert (run.path / "report.html").stat().st_size > 10_000


def test_the_lora_loads_into_the_stock_pipeline_and_gives_the_images_that_were_judged(
    finished: tuple[Config, RunFolder], tiny_lcm: Path
) -> None:
    config, run = finished
    stock = LatentConsistencyModelPipeline.from_pretrained(tiny_lcm, safety_checker=None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    rows = pq.read_table(run.step("5-evaluation") / "comparison.parquet").to_pylist()
    noise = torch.stack(
        [noise_at((4, 8, 8), config.run.seed, "image", row["prompt"], row["sample_index"]) for row in rows]
    )
    seeded = LatentConsistency.load(str(tiny_lcm), device="cpu").sampler_generators

    def images() -> np.ndarray:
        made = stock(
            [row["prompt"] for row in rows],
            latents=noise.clone(),
            generator=seeded(noise),
            num_inference_steps=2,
            guidance_scale=8.0,
            output_type="np",
        )
        return (made.images * 255).round().astype(int)

    def kept(column: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(row[column]))) for row in rows]).astype(int)

    assert len(rows) == 4
    assert abs(images() - kept("base_image")).max() <= 1
    stock.load_lora_weights(run.step("4-training") / "lora")
    assert abs(images() - kept("tuned_image")).max() <= 1
    assert abs(kept("tuned_image") - kept("base_image")).max() > 1

"""The whole way on a real local Ray for each further family: generation to a LoRA in the stock pipeline."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from cdpo_ray.config import validate
from cdpo_ray.models.seeds import noise_at
from cdpo_ray.run import run_steps
from cdpo_ray.session import ray_session
from cdpo_ray.steps import STEPS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SIDE = 32


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    with ray_session():
        yield


@pytest.mark.parametrize(("family", "channels"), [("stable_diffusion_xl", 4), ("stable_diffusion_3", 16), ("flux", 16)])
def test_the_lora_of_a_whole_run_gives_its_images_in_the_stock_pipeline(
    tiny_folder: Callable[[str], Path], family: str, channels: int, tmp_path: Path
) -> None:
    config = validate(
        {
            "run": {"name": "run", "dir": str(tmp_path), "seed": 3},
            "prompts": {"train": {"source": "animals", "count": 3}, "heldout": {"source": "scenes", "count": 2}},
            "model": {"family": family, "path": str(tiny_folder(family))},
            "generation": {
                "images_per_prompt": 3,
                "num_denoising_steps": 2,
                "guidance_scale": 2.0,
                "height": SIDE,
                "width": SIDE,
            },
            "rewards": {"names": ["jpeg_size"]},
            "curriculum": {"num_stages": 2, "updates_per_stage": 2},
            "training": {
                "beta": 500,
                "learning_rate": 0.05,
                "global_batch_size": 2,
                "empty_prompt_fraction": 0.25,
                "lora": {"rank": 4, "alpha": 8},
            },
            "evaluation": {"images_per_prompt": 1, "judges": ["jpeg_size"], "num_bootstrap_resamples": 100},
        },
        where="test",
    )
    run = run_steps(config, STEPS)
    updates = [json.loads(line) for line in (run.step("4-training") / "updates.jsonl").read_text().splitlines()]
    assert [(update["stage"], update["margin"] == 0) for update in updates] == [
        (1, True),
        (1, False),
        (2, False),
        (2, False),
    ]
    assert updates[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)

    rows = pq.read_table(run.step("5-evaluation") / "comparison.parquet").to_pylist()
    stock: Any = DiffusionPipeline.from_pretrained(tiny_folder(family))
    stock.set_progress_bar_config(disable=True)
    if family == "stable_diffusion_xl":
        stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    shape = (channels, SIDE // 8, SIDE // 8)
    noise = torch.stack([noise_at(shape, 3, "image", row["prompt"], row["sample_index"]) for row in rows])
    if family == "flux":
        noise = stock._pack_latents(noise, *noise.shape)

    def images() -> np.ndarray:
        made = stock(
            [row["prompt"] for row in rows],
            latents=noise,
            height=SIDE,
            width=SIDE,
            num_inference_steps=2,
            guidance_scale=2.0,
            output_type="np",
        )
        return (made.images * 255).round().astype(int)

    def kept(column: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(row[column]))) for row in rows]).astype(int)

    assert abs(images() - kept("base_image")).max() <= 1
    stock.load_lora_weights(run.step("4-training") / "lora")
    assert abs(images() - kept("tuned_image")).max() <= 1
    assert abs(kept("tuned_image") - kept("base_image")).max() > 3

"""Every family from prompts to a LoRA that is loaded back: its real classes, narrow."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline
from PIL import Image

from cdpo_ray.config import Config, validate
from cdpo_ray.config.model import GUIDANCE_FROM_ZERO
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.run import run_steps
from cdpo_ray.steps import STEPS
from cdpo_ray.store import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

LATENT_SHAPES = {
    **{"stable_diffusion_xl": (4, 8, 8), "latent_consistency": (4, 8, 8), "stable_diffusion_3": (16, 8, 8)},
    **{"flux": (16, 8, 8), "flux2": (32, 4, 4), "z_image": (16, 8, 8), "qwen_image": (16, 8, 8), "sana": (32, 2, 2)},
}
STEPS_OF = {"latent_consistency": 1}  # with more, a consistency model adds noise of its own
GUIDANCE = 2.0


def make_config(family: str, model: dict[str, Any], folder: Path) -> Config:
    return validate(
        {
            "run": {"name": family, "dir": str(folder), "seed": 3},
            "prompts": {"train": {"source": "animals", "count": 3}, "heldout": {"source": "scenes", "count": 2}},
            "model": {"family": family, **model},
            "generation": {
                "images_per_prompt": 3,
                "num_denoising_steps": STEPS_OF.get(family, 2),
                "guidance_scale": GUIDANCE,
                "images_per_batch": 3,
                "height": 64,
                "width": 64,
            },
            "rewards": {"names": ["jpeg_size"]},
            "curriculum": {"num_stages": 2, "updates_per_stage": 2},
            "training": {
                "beta": 500,
                "learning_rate": 1e-2,
                "global_batch_size": 2,
                "empty_prompt_fraction": 0.25,
                "lora": {"rank": 4, "alpha": 8},
            },
            "evaluation": {"images_per_prompt": 2, "judges": ["jpeg_size"], "num_bootstrap_resamples": 200},
        },
        where="test",
    )


# One family always; `tests/export/test_formats.py` has the same claim about the LoRA of each, in one process.
@pytest.mark.parametrize(
    "family",
    [
        family if family == "stable_diffusion_3" else pytest.param(family, marks=pytest.mark.nightly)
        for family in LATENT_SHAPES
    ],
)
def test_the_lora_of_a_family_makes_the_judged_images_in_the_stock_pipeline(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Run all steps; base and LoRA, loaded into diffusers' pipeline, make the images of both arms."""
    model: dict[str, Any] = {"path": str(tiny_models(family))}
    config = make_config(family, model, tmp_path)
    run: RunFolder = run_steps(config, STEPS)
    stock = DiffusionPipeline.from_pretrained(model["path"], dtype=torch.float32)
    if family == "stable_diffusion_xl":
        stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    stock.set_progress_bar_config(disable=True)
    rows = pq.read_table(run.step("5-evaluation") / "comparison.parquet").to_pylist()
    implicit = [row["implicit_value"] for row in rows]
    assert np.isfinite(implicit).all() and len(set(implicit)) == len(rows)
    shape = LATENT_SHAPES[family]
    noise = torch.stack([noise_at(shape, 3, "image", row["prompt"], row["sample_index"]) for row in rows])
    latents = FluxPipeline._pack_latents(noise, *noise.shape) if family in ("flux", "qwen_image") else noise
    options: dict[str, Any] = {
        "qwen_image": {"true_cfg_scale": GUIDANCE, "negative_prompt": [" "] * len(rows)},
        "sana": {"guidance_scale": GUIDANCE, "use_resolution_binning": False},
    }.get(family, {"guidance_scale": GUIDANCE - (family in GUIDANCE_FROM_ZERO)})

    def made() -> np.ndarray:
        images = stock(
            prompt=[row["prompt"] for row in rows],
            latents=latents.clone(),
            height=64,
            width=64,
            num_inference_steps=config.generation.num_denoising_steps,
            **options,
            output_type="np",
        ).images
        return (images * 255).round().astype(int)

    def kept(arm: str) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(row[f"{arm}_image"]))) for row in rows]).astype(int)

    assert abs(made() - kept("base")).max() <= 1
    stock.load_lora_weights(run.step("4-training") / "lora")
    assert abs(made() - kept("tuned")).max() <= 1
    assert abs(kept("tuned") - kept("base")).max() > 1

"""Finished run folders for tests: manifests of the real steps around synthetic content."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cdpo_ray.config import Config, validate
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, attach_lora, save_lora
from cdpo_ray.records import EVALUATION, SCORES, TRAINING, score_file
from cdpo_ray.run import round_folders
from cdpo_ray.steps import STEPS


def config_of(runs_dir: Path, model_dir: Path | str, **sections: dict[str, Any]) -> Config:
    """A small configuration; the keys of ``sections`` override its own."""
    values: dict[str, Any] = {
        "run": {"name": "tuned", "dir": str(runs_dir), "seed": 3},
        "prompts": {"train": {"source": "scenes", "count": 6}, "heldout": {"source": "scenes", "count": 4}},
        "model": {"path": str(model_dir)},
        "generation": {"images_per_prompt": 4, "num_denoising_steps": 3, "guidance_scale": 3.0},
        "rewards": {"names": ["clip"]},
        "curriculum": {"num_stages": 3, "updates_per_stage": 5},
        "training": {"beta": 500, "learning_rate": 1e-4, "global_batch_size": 2},
        "evaluation": {"judges": ["clip", "oracle"]},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return validate(values, where="test")


def judged(base: float, tuned: float, *, within: float = 0.005) -> dict[str, Any]:
    """Entry of one judge in `metrics.json`."""
    difference = tuned - base
    return {
        "base": {"mean": base, "low": base - 0.01, "high": base + 0.01},
        "tuned": {"mean": tuned, "low": tuned - 0.01, "high": tuned + 0.01},
        "difference": {"mean": difference, "low": difference - within, "high": difference + within},
        "win_rate": {"mean": 0.71, "low": 0.66, "high": 0.76},
        "num_missing": 1,
    }


def write_run(
    config: Config,
    train: Callable[[int, Path], None],
    metrics: Callable[[int], dict[str, Any]] | None = None,
    write: Callable[[str, Path], None] = lambda step, folder: None,
) -> None:
    """Finish every step of every round.

    Args:
        train: takes the number of a round (1-based) and a folder, and writes the trained files of the round there.
        metrics: takes the number of a round and returns its `metrics.json`; `None`: the run is not evaluated.
        write: takes the name of a step and a folder, and writes further files of the step there.
    """
    previous = None
    for number, run in enumerate(round_folders(config), start=1):
        run.path.mkdir(parents=True)
        for step in STEPS:
            if step.folder == EVALUATION and metrics is None:
                continue
            inputs = step.fingerprints(config, run, previous)
            settings = step.settings(config)
            with run.writing(step.folder, settings, inputs, seed=config.run.seed, resumable=False) as (folder, output):
                if step.folder == SCORES:
                    for reward in config.rewards.names:
                        (folder / score_file(reward)).touch()
                if step.folder == TRAINING:
                    output.counts |= {"updates": 15, "pairs": 30}
                    train(number, folder)
                if step.folder == EVALUATION and metrics:
                    (folder / "metrics.json").write_text(json.dumps(metrics(number)))
                write(step.folder, folder)
        previous = run


def change(parameters: list[nn.Parameter], seed: int = 1, size: float = 0.05) -> None:
    """Add noise, as if trained; with a larger ``size``, attention saturates and rounding shows in the images."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def policy_of(config: Config, *, seed: int = 1) -> TextToImageModel:
    """The base model with a LoRA of random weights."""
    lora = config.training.lora
    model = load_model(
        config.model.family, **config.model.model_dump(include={"path", "config", "dtype"}), device="cpu"
    )
    change(attach_lora(model.denoiser, **lora.layers, seed=0), seed)
    return model


def save_policy(model: TextToImageModel, folder: Path) -> None:
    save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, folder / LORA_DIR)

"""Search for a setting of consistency DPO that improves the embedded consistency model on held-out prompts.

One process and one thread, without Ray. Training images and their scores are generated once and stored in
``--work-dir``. Each ``--setting`` is trained on them, sampled with the same noises as the base model, and printed as a
row: the oracle's attr and CLIP, with 95 % bootstrap intervals of the difference over prompts.

    python benchmarks/consistency_search.py --work-dir runs/consistency --setting "" --setting "target=teacher"
    python benchmarks/consistency_search.py --work-dir runs/consistency --setting "steps=4 lr=1e-3 min_rank_gap=6"
"""

import argparse
import shlex
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ablation import (  # isort: skip
    ALL_PAIRS, CUMULATIVE, EMBEDDED, WORLDS, Arm, Judged, World, diagnostics, draw, judge_heldout, make_pool, train,
)  # fmt: skip
import torch
from ablation import Setting as Sizes

from cdpo_ray.curriculum.schedule import Schedule
from cdpo_ray.evaluation.statistics import Estimate, NoInterval, compare_scores
from cdpo_ray.models import load_model

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "attention": ATTENTION,
    "all": (
        *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
        "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
    ),
}  # fmt: skip
LABEL_NOISE = {"scores": 0.0, "random": 0.5, "reversed": 1.0}


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        target: ``image`` or ``teacher`` (as published).
        timesteps: ``sampler``, ``all``, or one or several, comma-separated.
        guidance: range of w in training.
        schedule: ``paper``: four cumulative stages; ``none``: all pairs in each stage.
        lora: layers that get one: a key of `TARGETS`.
        labels: a key of `LABEL_NOISE`.
        steps: number of denoising steps.
        images, prompts: size of the training set: images per prompt, and prompts.
    """

    target: str = "image"
    beta: float = 400.0
    lr: float = 5e-4
    updates: int = 200
    timesteps: str = "sampler"
    guidance: str = "0-0"
    schedule: str = "paper"
    min_rank_gap: int = 1
    rank: int = 8
    lora: str = "attention"
    loss: str = "dpo"
    safeguard: float = 0.0
    labels: str = "scores"
    steps: int = 2
    images: int = 8
    prompts: int = 128
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """``"beta=400 lr=1e-4 min_rank_gap=6"``; other fields have their defaults."""
        types: dict[str, Any] = {field.name: field.type for field in fields(cls)}
        given = dict(word.split("=") for word in shlex.split(text))
        return cls(**{key: types[key](value) for key, value in given.items()})

    def __str__(self) -> str:
        shown = [field for field in fields(self) if getattr(self, field.name) != field.default]
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in shown) or "defaults"

    @property
    def world(self) -> World:
        """The consistency model at this number of denoising steps."""
        return replace(WORLDS["consistency"], num_denoising_steps=self.steps)

    @property
    def sizes(self) -> Sizes:
        """Sizes of training and evaluation."""
        return Sizes("consistency", "clip", self.updates, self.prompts, self.images, heldout=96, heldout_images=4)

    @property
    def arm(self) -> Arm:
        """The setting as an arm of the ablation."""
        pairs = {"paper": CUMULATIVE, "none": ALL_PAIRS}[self.schedule]
        schedule: Schedule = replace(pairs, min_rank_gap=self.min_rank_gap, label_noise=LABEL_NOISE[self.labels])
        training = {
            "beta": self.beta,
            "learning_rate": self.lr,
            "loss": self.loss,
            "safeguard": self.safeguard or None,
            "lora": {"rank": self.rank, "targets": TARGETS[self.lora]},
        }
        return Arm(str(self), schedule, training)

    def load(self) -> Any:
        """The model with this setting's target, timesteps and guidance."""
        low, high = map(float, self.guidance.split("-"))
        rules: dict[str, dict[str, Any]] = {"sampler": {"num_denoising_steps": self.steps}, "all": {}}
        listed = {} if self.timesteps in rules else {"listed": tuple(map(int, self.timesteps.split(",")))}
        return load_model(
            self.world.family,
            **EMBEDDED,
            for_training=True,
            keep_vae=True,
            guidance_range=(low, high),
            timesteps=rules.get(self.timesteps, listed),
            teacher=EMBEDDED if self.target == "teacher" else None,
        )


def main() -> None:
    """Train and judge each setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder of the training images")
    parser.add_argument("--setting", type=Setting.parse, action="append", required=True, help=Setting.parse.__doc__)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bases: dict[int, Judged] = {}
    print("| setting | attr | difference | CLIP difference | chosen's error | seconds |")
    print("|---|---|---|---|---|---|")
    for setting in options.setting:
        started = time.perf_counter()
        pool_dir = options.work_dir / f"samples-{setting.steps}-{setting.prompts}x{setting.images}"
        if not (pool_dir / "samples.parquet").is_file():
            make_pool(pool_dir, 0, setting.world, setting.sizes)
        if setting.steps not in bases:
            bases[setting.steps] = judge_heldout(setting.load(), setting.world, setting.sizes)
        stages = draw(setting.arm, setting.sizes, setting.seed, pool_dir)
        model = setting.load()
        records = train(model, setting.world, setting.arm, stages, setting.seed, pool_dir)
        tuned, base = judge_heldout(model, setting.world, setting.sizes), bases[setting.steps]
        attr, clip = (
            compare_scores(base.scores[name], tuned.scores[name], num_resamples=2000, seed=0)
            for name in ("oracle", "clip")
        )
        change = diagnostics(records, stages)["chosen_error_change"]
        print(
            f"| {setting} | {attr.base.mean:.3f} -> {attr.tuned.mean:.3f} | {_text(attr.difference)} |"
            f" {_text(clip.difference)} | {change:+.4f} | {time.perf_counter() - started:.0f} |",
            flush=True,
        )


def _text(found: Estimate) -> str:
    if isinstance(found, NoInterval):
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


if __name__ == "__main__":
    main()

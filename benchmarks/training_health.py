"""Curves and images of a healthy, a stalled, an exploding and a reward-hacking training, for `docs/training_health.md`.

Each trains the embedded model on the same images, without Ray, and is judged on the same held-out prompts. Figures are
written to ``--out``, and the figures of each training are printed as a Markdown table.

    python benchmarks/training_health.py
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ablation import ALL_PAIRS, EMBEDDED, JUDGES, WORLDS, Arm, Judged, Setting, draw, judge_heldout, make_pool, train  # isort: skip

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from cdpo_ray.config.training import HealthSection
from cdpo_ray.evaluation.figures import smooth_within_stages
from cdpo_ray.evaluation.statistics import compare_scores
from cdpo_ray.models import load_model
from cdpo_ray.pages.chart_style import BLUE, GREY, STYLE, VERMILLION
from cdpo_ray.training.health import highest_error_rise
from cdpo_ray.training.loop import UpdateRecord

SHOWN_PROMPTS = 8
SHOWN_JUDGES = (*JUDGES, "jpeg_size")


@dataclass(frozen=True)
class Example:
    """A training to show: its reward, and the keys of `training` that differ from the quickstart's."""

    name: str
    training: Mapping[str, Any]
    reward: str = "clip"


EXAMPLES = (
    Example("healthy", {}),
    Example("stalled", {"learning_rate": 5e-6}),
    Example("exploding", {"beta": 10, "learning_rate": 3e-3}),
    Example("hacked", {"beta": 50}, reward="jpeg_size"),
)


def draw_example(example: Example, records: Sequence[UpdateRecord], base: Judged, tuned: Judged, path: Path) -> None:
    """Change of both errors, margin and gradient norm over updates; below, the first prompts of base and tuned."""
    columns = {key: np.array([record[key] for record in records]) for key in records[0]}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
        curves = above.subplots(1, 3)
        for axes, title, lines in (
            (
                curves[0],
                "error, policy - reference",
                (("chosen", "error_change_w", BLUE), ("rejected", "error_change_l", VERMILLION)),
            ),
            (curves[1], "margin (nats)", (("", "margin", BLUE),)),
            (curves[2], "gradient norm", (("", "grad_norm", BLUE),)),
        ):
            for label, key, colour in lines:
                axes.plot(columns["update"], columns[key], color=colour, alpha=0.2, lw=0.8)
                smooth = smooth_within_stages(columns[key], columns["stage"])
                axes.plot(columns["update"], smooth, color=colour, lw=1.8, label=label)
            axes.axhline(0, color=GREY, lw=0.8, ls=":")
            axes.set_title(title)
            axes.set_xlabel("update")
        curves[0].legend(frameon=False)
        rows = below.subplots(2, SHOWN_PROMPTS)
        for row, (name, judged) in zip(rows, (("base", base), ("fine-tuned", tuned)), strict=True):
            for axes, image in zip(row, judged.images, strict=False):
                axes.imshow(image)
                axes.set(xticks=[], yticks=[])
            row[0].set_ylabel(name)
        figure.suptitle(f"{example.name}: ranked by {example.reward}, {_settings(example)}", x=0.01, ha="left")
        figure.savefig(path, dpi=110)


def _settings(example: Example) -> str:
    training = {**WORLDS["diffusion"].training, **example.training}
    return ", ".join(f"{key} {value:g}" for key, value in training.items())


def main() -> None:
    """Train and judge each example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/training_health"), help="folder of the samples")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder of the figures")
    options = parser.parse_args()
    setting = Setting("diffusion", "clip", options.updates, prompts=128, images=8, heldout=96, heldout_images=4)
    if not (options.work_dir / "samples.parquet").is_file():
        make_pool(options.work_dir, 0, WORLDS[setting.world], setting)
    torch.set_num_threads(1)
    world = WORLDS[setting.world]
    base = judge_heldout(load_model(world.family, **EMBEDDED), world, setting, SHOWN_JUDGES)
    window = HealthSection().window
    print("| run | attributes right | CLIP | JPEG size | highest rise of the chosen's error |\n|---|---|---|---|---|")
    for example in EXAMPLES:
        arm = Arm(example.name, ALL_PAIRS, example.training)
        model = load_model(world.family, **EMBEDDED, keep_vae=True, for_training=True)
        stages = draw(arm, replace(setting, reward=example.reward), 0, options.work_dir)
        records = train(model, world, arm, stages, 0, options.work_dir)
        tuned = judge_heldout(model, world, setting, SHOWN_JUDGES)
        draw_example(example, records, base, tuned, options.out / f"training_{example.name}.png")
        cells = []
        for judge in SHOWN_JUDGES:
            found = compare_scores(base.scores[judge], tuned.scores[judge], num_resamples=2000, seed=0)
            cells.append(f"{found.base.mean:.3f} -> {found.tuned.mean:.3f}")
        rise = highest_error_rise(records, num_updates=options.updates, window=window)
        print(f"| {example.name} | {' | '.join(cells)} | {rise:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""Ablation of the curriculum in the embedded world: schedules at equal updates, seeds and samples.

Every arm trains on the same samples and scores (a pool), for the same number of updates of the same size, and is judged
on held-out prompts from the same noises. Each run (arm, seed, pool) is a file in ``--out``: the same command resumes.
Intervals are 95 %, by bootstrap over runs and prompts.

    python benchmarks/ablation.py                                # all arms, 4 seeds, one pool
    python benchmarks/ablation.py --arms plain,paper --seeds 8 --pools 2 --updates 1000
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: two processes of one thread beat one of two

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from alone import form_group_alone
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from cdpo_ray.config.training import LoraSection, TrainingSection
from cdpo_ray.curriculum.pairs import PairArrays, concat
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.evaluation.statistics import mean_over_runs
from cdpo_ray.generation.generator import Generator, Sampling, sample_batches
from cdpo_ray.models import load_model
from cdpo_ray.pages.chart_style import BLUE, GREY, STYLE, VERMILLION
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.randomness.numbers import seed_of
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.testbed.scenes import scene_prompts
from cdpo_ray.training.batches import SampleBank, StagePairs
from cdpo_ray.training.engine import start_engine
from cdpo_ray.training.loop import Callbacks, Feed, TrainingState, train_stages
from cdpo_ray.training.losses import preference_loss

FAMILY, MODEL = "stable_diffusion", {"path": "embedded", "device": "cpu"}
BETA, PAIRS_PER_UPDATE, NUM_STAGES = 200.0, 16, 4
TRAINING = TrainingSection(beta=BETA, learning_rate=5e-4, global_batch_size=PAIRS_PER_UPDATE)
TRAIN_SEED, HELDOUT_SEED = 0, 0
JUDGES = {"oracle": "attributes right", "clip": "CLIP"}
BASE, PLAIN, EASIEST = "base", "plain", "easiest-only"

PAPER = Schedule(num_stages=NUM_STAGES)
ARMS: dict[str, tuple[str, Schedule | None]] = {
    BASE: ("base model, not trained", None),
    PLAIN: ("plain DPO", replace(PAPER, order="none")),
    "paper": ("paper: easy to hard, cumulative", PAPER),
    "one-stage": ("easy to hard, one stage at a time", replace(PAPER, pacing="one_stage")),
    "hard-to-easy": ("hard to easy, cumulative", replace(PAPER, order="hard_to_easy")),
    "random": ("levels dealt at random, cumulative", replace(PAPER, order="random")),
    EASIEST: ("easiest level only", PAPER),
    "shuffled": ("the paper's draws in no order", replace(PAPER, order="shuffled")),
    "best-against-worst": ("best against worst only", replace(PAPER, order="best_against_worst")),
    "released-code": ("released code: score gap > 0.1, linear", replace(PAPER, measure="score_gap", min_score_gap=0.1)),
    "swapped": ("paper, labels swapped at random", replace(PAPER, label_noise=0.5)),
}


@dataclass(frozen=True)
class Size:
    """Sizes of a run."""

    prompts: int
    images: int
    updates: int
    heldout: int
    heldout_images: int


def make_pool(folder: Path, pool: int, size: Size) -> None:
    """Generate samples with their CLIP scores, as in `1-samples`."""
    torch.set_num_threads(1)
    sampling = Sampling(pool, size.images, 10, 1.0, None, None, images_per_batch=8)
    generator = Generator(FAMILY, MODEL, sampling, make_scores=partial(Scorer, {"clip": {}}), keep_pixels=False)
    prompts = scene_prompts("train", size.prompts, TRAIN_SEED)
    rows = pa.table({"prompt_index": pa.array(range(len(prompts)), pa.int64()), "prompt": prompts})
    made = pa.concat_tables([generator(rows.slice(start, 1)) for start in range(len(prompts))])
    folder.mkdir(parents=True)
    pq.write_table(made, folder / "samples.parquet.tmp")
    (folder / "samples.parquet.tmp").rename(folder / "samples.parquet")


def pairs_of_stages(arm: str, curriculum: Curriculum, pairs_per_stage: int) -> list[PairArrays]:
    """Pairs of each stage of an arm."""
    if arm == EASIEST:
        whole_run = curriculum.plan(1, NUM_STAGES * pairs_per_stage)[0]
        return [whole_run.take(places) for places in np.split(np.arange(len(whole_run)), NUM_STAGES)]
    return [curriculum.plan(stage, pairs_per_stage)[0] for stage in range(1, NUM_STAGES + 1)]


def run_arm(arm: str, seed: int, pool_dir: Path, size: Size, output: Path) -> float:
    """Train one arm, judge it on held-out prompts, write its ``[prompt, image]`` scores and pairs; returns seconds."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    model = load_model(FAMILY, **MODEL)
    result: dict[str, Any] = {"arm": arm, "seed": seed}
    schedule = ARMS[arm][1]
    if schedule:
        result |= train(model, arm, schedule, seed, pool_dir, size)
    prompts = scene_prompts("heldout", size.heldout, HELDOUT_SEED)
    sampling = Sampling(HELDOUT_SEED, size.heldout_images, 10, 1.0, None, None, images_per_batch=32)
    scorer = Scorer({judge: {} for judge in JUDGES})
    conditioning, _ = model.encode_prompts(prompts)
    scores = [scorer(batch.images, batch.prompts) for batch in sample_batches(model, prompts, conditioning, sampling)]
    for judge in JUDGES:
        result[judge] = np.concatenate([batch[judge] for batch in scores]).reshape(size.heldout, -1).tolist()
    result["seconds"] = time.perf_counter() - started
    aside = output.with_suffix(".tmp")
    aside.write_text(json.dumps(result))
    aside.rename(output)
    return float(result["seconds"])


def train(model: Any, arm: str, schedule: Schedule, seed: int, pool_dir: Path, size: Size) -> dict[str, Any]:
    """Train a LoRA into the model; returns the mean rank gap and the chosen's change of error at the end."""
    if not torch.distributed.is_initialized():
        form_group_alone("cpu")
    bank = SampleBank.read(pool_dir)
    table = pq.read_table(pool_dir / "samples.parquet", columns=["prompt_index", "score_clip"]).sort_by("prompt_index")
    curriculum = Curriculum(rank_samples(np.array(table["score_clip"].to_pylist())), schedule, seed=seed)
    stages = pairs_of_stages(arm, curriculum, size.updates // NUM_STAGES * PAIRS_PER_UPDATE)
    policy = make_policy(model, LoraSection(), seed=seed_of(seed, "lora"))
    engine = start_engine(model.denoiser.train(), policy.trainable, TRAINING, num_workers=1)
    feed = Feed(bank, model.draw_times, model.empty_conditioning, TRAINING, seed)
    columns = ("prompt", "chosen", "rejected")
    callbacks = Callbacks(
        lambda state: StagePairs(state.stage, *(getattr(stages[state.stage - 1], name) for name in columns))
    )
    loss = partial(preference_loss, beta=BETA)
    state = train_stages(engine, policy, feed, TrainingState(), callbacks, num_stages=NUM_STAGES, preference_loss=loss)
    model.denoiser.eval()
    last = state.records[-max(1, size.updates // NUM_STAGES) :]
    shown = concat(stages)
    return {
        "rank_gap": float(shown.rank_gap.mean()),
        "chosen_error_change": float(np.mean([r["policy_error_w"] - r["reference_error_w"] for r in last])),
    }


def scores_of(out: Path, arm: str, runs: Sequence[tuple[int, int]], judge: str) -> NDArray[np.float64]:
    """``[run, prompt]`` scores, mean over images."""
    return np.array([_read(out, arm, *run)[judge] for run in runs]).mean(axis=2)


def findings(out: Path, arms: Sequence[str], runs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """One row per arm: means, differences to base and to plain DPO with intervals, spread over runs."""
    rows = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm, "name": ARMS[arm][0]}
        for judge in JUDGES:
            mine = scores_of(out, arm, runs, judge)
            row[judge] = float(mine.mean())
            row[f"{judge}_spread"] = float(mine.mean(axis=1).std(ddof=1)) if len(runs) > 1 else 0.0
            for other in (BASE, PLAIN):
                if other in arms and arm != other:
                    difference = mean_over_runs(mine - scores_of(out, other, runs, judge))
                    row[f"{judge}_to_{other}"] = astuple(difference)
        for extra in ("rank_gap", "chosen_error_change"):
            if ARMS[arm][1]:
                row[extra] = float(np.mean([_read(out, arm, *run)[extra] for run in runs]))
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print a Markdown table."""
    head = "arm", "attributes right", "to base", "to plain", "CLIP to base", "spread", "mean rank gap", "chosen's error"
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for row in rows:
        cells = [
            row["name"],
            f"{row['oracle']:.3f}",
            _interval_text(row.get("oracle_to_base")),
            _interval_text(row.get("oracle_to_plain")),
            _interval_text(row.get("clip_to_base")),
            f"{row['oracle_spread']:.3f}" if row["arm"] != BASE else "",
            f"{row['rank_gap']:.2f}" if "rank_gap" in row else "",
            f"{row['chosen_error_change']:+.4f}" if "rank_gap" in row else "",
        ]
        print(f"| {' | '.join(cells)} |")


def draw(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Plot each arm's difference to the base model and to plain DPO, with intervals."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 1.2 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for side, other, name in ((axes[0], BASE, "base model"), (axes[1], PLAIN, "plain DPO")):
            side.axvline(0, color=GREY, lw=0.9, ls="--")
            for height, row in enumerate(reversed(rows)):
                if found := row.get(f"oracle_to_{other}"):
                    mean, low, high = found
                    colour = BLUE if low > 0 else VERMILLION if high < 0 else GREY
                    reach = [[mean - low], [high - mean]]
                    side.errorbar(mean, height, xerr=reach, fmt="o", color=colour, capsize=3, markersize=5, lw=1.6)
            side.set_title(f"difference to {name}, 95 %")
            side.grid(visible=False, axis="y")
        axes[0].set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.savefig(path, dpi=160)


def _interval_text(found: tuple[float, float, float] | None) -> str:
    return f"{found[0]:+.3f} [{found[1]:+.3f}, {found[2]:+.3f}]" if found else ""


def _read(out: Path, arm: str, seed: int, pool: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_path(out, arm, seed, pool).read_text())
    return result


def _path(out: Path, arm: str, seed: int, pool: int) -> Path:
    if arm == BASE:  # no seed of training, no pool
        seed, pool = 0, 0
    return out / f"{arm}-seed{seed}-pool{pool}.json"


def main() -> None:
    """Make missing pools and runs, then the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=",".join(ARMS), help="names, comma-separated: %(default)s")
    parser.add_argument(
        "--seeds", type=int, default=4, help="number of training seeds (draws, noise, LoRA initialisation)"
    )
    parser.add_argument("--pools", type=int, default=1, help="number of sample sets; every seed trains on each")
    parser.add_argument("--updates", type=int, default=200, help="updates of all stages; 16 pairs each")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--images", type=int, default=8, help="images per prompt")
    parser.add_argument("--heldout", type=int, default=96, help="number of held-out prompts")
    parser.add_argument("--heldout-images", type=int, default=4, help="images per held-out prompt")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    arms = options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"unknown arms {', '.join(unknown)}; known: {', '.join(ARMS)}")
    size = Size(options.prompts, options.images, options.updates, options.heldout, options.heldout_images)
    out = options.out / f"u{size.updates}-p{size.prompts}x{size.images}-h{size.heldout}x{size.heldout_images}"
    out.mkdir(parents=True, exist_ok=True)
    runs = [(seed, pool) for pool in range(options.pools) for seed in range(options.seeds)]
    pools = {pool: out / f"pool-{pool}" for pool in range(options.pools)}
    started = time.perf_counter()
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as workers:
        missing = [pool for pool, folder in pools.items() if not (folder / "samples.parquet").is_file()]
        list(workers.map(partial(make_pool, size=size), [pools[pool] for pool in missing], missing))
        wanted = {_path(out, arm, *run): (arm, *run) for run in runs for arm in arms}
        tasks = [
            workers.submit(run_arm, arm, seed, pools[pool], size, path)
            for path, (arm, seed, pool) in wanted.items()
            if not path.is_file()
        ]
        for task in tqdm(as_completed(tasks), total=len(tasks), desc="ablation", unit="run"):
            task.result()
    rows = findings(out, arms, runs)
    print_table(rows)
    (out / "findings.json").write_text(json.dumps(rows, indent=1))
    judged = f"{size.heldout} held-out prompts x {size.heldout_images}"
    title = f"attributes right: {size.updates} updates, {len(runs)} runs an arm, {judged}"
    draw(rows, out / "ablation.png", title=title)
    print(f"{len(tasks)} runs in {(time.perf_counter() - started) / 60:.1f} min; {out / 'ablation.png'}")


if __name__ == "__main__":
    main()

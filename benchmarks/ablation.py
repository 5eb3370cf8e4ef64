"""Ablation in the embedded world: curricula, losses and targets at equal updates, seeds and samples.

Every arm trains on the same samples and scores (a pool) for the same number of updates of 16 pairs, and is judged on
held-out prompts from the same noises: by the oracle, which is never trained on, and by CLIP. Seed ``s`` trains on pool
``s mod --pools``. Finished runs are lines of ``--records``, so the same command resumes, and ``--table`` prints the
tables of the recorded runs without computing anything. Intervals are 95 %, by crossed random effects of runs and
prompts.

    python benchmarks/ablation.py --arms plain,paper --seeds 16
    python benchmarks/ablation.py --arms plain,paper,easiest-only --reward perturbation --seeds 4
    python benchmarks/ablation.py --world consistency --arms easiest-only,easiest-reversed,easiest-published --seeds 1-4
    python benchmarks/ablation.py --table --page docs/results.md
"""

import argparse
import json
import multiprocessing
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from alone import form_group_alone
from ddpo import Setting as DdpoSetting
from ddpo import train_ddpo
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

from cdpo_ray.config.training import TrainingSection
from cdpo_ray.curriculum.combination import RankingRule
from cdpo_ray.curriculum.pairs import PairArrays, concat
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.evaluation.statistics import mean_over_runs
from cdpo_ray.generation.generator import Generator, Sampling, sample_batches
from cdpo_ray.models import load_model
from cdpo_ray.pages.chart_style import BLUE, GREY, STYLE, VERMILLION
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.randomness.numbers import seed_of
from cdpo_ray.records import score_column
from cdpo_ray.rewards.scorer import Scorer, load_reward
from cdpo_ray.testbed.scenes import scene_prompts
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import StagePairs
from cdpo_ray.training.engine import start_engine
from cdpo_ray.training.loop import Callbacks, Feed, TrainingState, UpdateRecord, train_stages
from cdpo_ray.training.losses import preference_loss

PAIRS_PER_UPDATE, NUM_STAGES = 16, 4
PROMPT_SEED, HELDOUT_SEED = 0, 0
JUDGES = {"oracle": "attributes right", "clip": "CLIP"}
BASE, PLAIN, PAPER = "base", "plain", "paper"
EMBEDDED = {"path": "embedded"}


@dataclass(frozen=True)
class World:
    """A model, how it is sampled, and the training keys that suit it."""

    family: str
    num_denoising_steps: int
    guidance_scale: float
    training: Mapping[str, Any]
    model: Mapping[str, Any] = field(default_factory=dict)


WORLDS = {
    "diffusion": World("stable_diffusion", 10, 1.0, {"beta": 200, "learning_rate": 5e-4}),
    "consistency": World(
        "latent_consistency",
        2,
        1.0,
        {"beta": 400, "learning_rate": 5e-4},
        {"guidance_range": (0.0, 0.0), "timesteps": {"num_denoising_steps": 2}},
    ),
}
REWARDS = {
    "clip": ("clip", {"clip": 1.0}),
    "perturbation": ("perturbation", {"perturbation": 1.0}),
    "agreement": ("pareto", {"clip": 1.0, "perturbation": 1.0}),
    "jpeg_size": ("jpeg_size", {"jpeg_size": 1.0}),
}
"""Reward -> rule and scores that rank the samples."""
PERTURBED = ("perturbation", "agreement")
"""Rewards that rank images of perturbed prompts."""


@dataclass(frozen=True)
class Arm:
    """One row of a table.

    Attributes:
        name: sentence for the table.
        schedule: `None`: not trained on pairs.
        training, model: keys of `TrainingSection` and of the model's ``load`` that differ from the world's.
        reversed: train the stages of the schedule in the opposite order.
        world: the only world that it applies to; `None`: all.
        method: ``dpo`` or ``ddpo``.
    """

    name: str
    schedule: Schedule | None
    training: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    reversed: bool = False
    world: str | None = None
    method: str = "dpo"


CUMULATIVE = Schedule(num_stages=NUM_STAGES)
ALL_PAIRS = replace(CUMULATIVE, order="none")
EASIEST = replace(ALL_PAIRS, min_rank_gap=6)
RELIABLE = replace(CUMULATIVE, min_rank_gap=4)
WEIGHTED = replace(ALL_PAIRS, draws="by_measure")
SAFE = {"safeguard": 0.5, "schedule": {"decay": "cosine"}}
ARMS: dict[str, Arm] = {
    BASE: Arm("base model, not trained", None),
    PLAIN: Arm("plain DPO", ALL_PAIRS),
    PAPER: Arm("paper: easy to hard, cumulative", CUMULATIVE),
    "shuffled": Arm("the paper's draws, shuffled", replace(CUMULATIVE, order="shuffled")),
    "reversed-stages": Arm("the paper's draws, last stage first", CUMULATIVE, reversed=True),
    "hard-to-easy": Arm("hard to easy, cumulative", replace(CUMULATIVE, order="hard_to_easy")),
    "one-stage": Arm("easy to hard, one level at a time", replace(CUMULATIVE, pacing="one_stage")),
    "easiest-only": Arm("rank gaps 6 and 7 only", EASIEST),
    "reliable": Arm("rank gaps from 4, easy to hard, cumulative", RELIABLE),
    "gap-weighted": Arm("all pairs, drawn in proportion to the rank gap", WEIGHTED),
    "plain-safe": Arm("plain DPO, safeguard and cosine decay", ALL_PAIRS, SAFE),
    "paper-safe": Arm("paper, safeguard and cosine decay", CUMULATIVE, SAFE),
    "easiest-safe": Arm("rank gaps 6 and 7 only, safeguard and cosine decay", EASIEST, SAFE),
    "reliable-safe": Arm("rank gaps from 4, safeguard and cosine decay", RELIABLE, SAFE),
    "gap-weighted-safe": Arm("drawn in proportion to the rank gap, safeguard and cosine decay", WEIGHTED, SAFE),
    "best-against-worst": Arm("best against worst only", replace(CUMULATIVE, order="best_against_worst")),
    "released-code": Arm(
        "released code: levels by score gap > 0.1", replace(CUMULATIVE, measure="score_gap", min_score_gap=0.1)
    ),
    "swapped": Arm("paper, labels random (control)", replace(CUMULATIVE, label_noise=0.5)),
    "reversed-labels": Arm("paper, labels reversed (control)", replace(CUMULATIVE, label_noise=1.0)),
    "easiest-random": Arm("rank gaps 6 and 7 only, labels random (control)", replace(EASIEST, label_noise=0.5)),
    "easiest-reversed": Arm("rank gaps 6 and 7 only, labels reversed (control)", replace(EASIEST, label_noise=1.0)),
    "easiest-published": Arm(
        "rank gaps 6 and 7 only, the published target", EASIEST, model={"teacher": EMBEDDED}, world="consistency"
    ),
    "sft": Arm("fine-tuning on the paper's chosen images", CUMULATIVE, {"loss": "sft"}),
    "ddpo": Arm("DDPO, as many images and updates", None, method="ddpo"),
}


@dataclass(frozen=True)
class Setting:
    """What the arms of one table share."""

    world: str
    reward: str
    updates: int
    prompts: int
    images: int
    heldout: int
    heldout_images: int

    @property
    def pool_name(self) -> str:
        """Folder of the samples, which rewards that rank the same images share."""
        kind = "perturbed" if self.reward in PERTURBED else "plain"
        return f"{self.world}-{kind}-{self.prompts}x{self.images}"


Key = tuple[Setting, str, int, int]
"""Setting, arm, seed and pool of a run."""
Records = dict[Key, dict[str, Any]]


def make_pool(folder: Path, pool: int, world: World, setting: Setting) -> None:
    """Generate samples with their scores, as in `1-samples`."""
    torch.set_num_threads(1)
    masked = 1.0 if setting.reward in PERTURBED else None
    sampling = replace(_sampling(world, pool, setting.images), max_masked_fraction=masked)
    make_scores = partial(Scorer, {"clip": {}, "jpeg_size": {}})
    generator = Generator(world.family, dict(EMBEDDED), sampling, make_scores=make_scores, keep_pixels=False)
    prompts = scene_prompts("train", setting.prompts, PROMPT_SEED)
    rows = pa.table({"prompt_index": pa.array(range(len(prompts)), pa.int64()), "prompt": prompts})
    per_call = max(1, sampling.images_per_batch // setting.images)
    made = pa.concat_tables([generator(rows.slice(start, per_call)) for start in range(0, len(prompts), per_call)])
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, folder / "samples.parquet.tmp")
    (folder / "samples.parquet.tmp").rename(folder / "samples.parquet")


def run_arm(key: Key, pool_dir: Path) -> dict[str, Any]:
    """Train one arm and judge it on held-out prompts: mean scores ``[prompt]`` of each judge, and diagnostics."""
    setting, name, seed, _ = key
    started = time.perf_counter()
    torch.set_num_threads(1)
    world, arm = WORLDS[setting.world], ARMS[name]
    model = load_model(world.family, **EMBEDDED, keep_vae=True, for_training=True, **{**world.model, **arm.model})
    result: dict[str, Any] = {}
    if arm.method == "ddpo":
        ddpo = DdpoSetting(num_images=setting.prompts * setting.images, num_updates=setting.updates)
        train_ddpo(
            model, load_reward("clip", {}), scene_prompts("train", setting.prompts, PROMPT_SEED), ddpo, seed=seed
        )
    elif arm.schedule:
        stages = draw(arm, setting, seed, pool_dir)
        records = train(model, world, arm, stages, seed, pool_dir)
        result |= diagnostics(records, stages)
    for judge, scores in judge_heldout(model, world, setting).scores.items():
        result[judge] = [round(float(mean), 5) for mean in scores.mean(axis=1)]
    return result | {"seconds": round(time.perf_counter() - started, 1)}


@dataclass(frozen=True)
class Judged:
    """First image of each held-out prompt, uint8 ``[prompt, height, width, 3]``, and scores ``[prompt, image]``."""

    images: NDArray[np.uint8]
    scores: dict[str, NDArray[np.float64]]


def judge_heldout(model: Any, world: World, setting: Setting, judges: Sequence[str] = tuple(JUDGES)) -> Judged:
    """Sample the held-out prompts, from the same noises for every model, and judge the images."""
    prompts = scene_prompts("heldout", setting.heldout, HELDOUT_SEED)
    sampling = _sampling(world, HELDOUT_SEED, setting.heldout_images)
    scorer = Scorer({judge: {} for judge in judges})
    batches = list(sample_batches(model, prompts, model.encode_prompts(prompts)[0], sampling, scorer))
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy()
    scores = {name: np.concatenate([batch.scores[name] for batch in batches]) for name in judges}
    per_prompt = setting.heldout_images
    return Judged(images[::per_prompt], {name: values.reshape(-1, per_prompt) for name, values in scores.items()})


def train(
    model: Any, world: World, arm: Arm, stages: Sequence[PairArrays], seed: int, pool_dir: Path
) -> Sequence[UpdateRecord]:
    """Train a LoRA into the model on the pairs of each stage; returns one record per update."""
    if not torch.distributed.is_initialized():
        form_group_alone("cpu")
    section = TrainingSection(global_batch_size=PAIRS_PER_UPDATE, **{**world.training, **arm.training})
    bank = SampleBank.open(pool_dir)
    policy = make_policy(model, section.lora, seed=seed_of(seed, "lora"))
    engine = start_engine(model.denoiser.train(), policy.trainable, section, num_workers=1)
    feed = Feed(bank, model.draw_times, model.empty_conditioning, section, seed)
    columns = ("prompt", "chosen", "rejected")
    callbacks = Callbacks(
        lambda state: StagePairs(state.stage, *(getattr(stages[state.stage - 1], name) for name in columns))
    )
    loss = partial(preference_loss, beta=section.beta, **section.loss.arguments)
    state = train_stages(engine, policy, feed, TrainingState(), callbacks, num_stages=len(stages), preference_loss=loss)
    model.denoiser.eval()
    return state.records


def diagnostics(records: Sequence[UpdateRecord], stages: Sequence[PairArrays]) -> dict[str, float]:
    """Mean rank gap of the drawn pairs, and changes of error in the last stage."""
    last = [record for record in records if record["stage"] == len(stages)]
    return {
        "rank_gap": float(concat(stages).rank_gap.mean()),
        **{
            f"{side}_error_change": float(np.mean([r[f"policy_error_{s}"] - r[f"reference_error_{s}"] for r in last]))
            for side, s in (("chosen", "w"), ("rejected", "l"))
        },
    }


def draw(arm: Arm, setting: Setting, seed: int, pool_dir: Path) -> list[PairArrays]:
    """Pairs of each stage."""
    assert arm.schedule is not None, "called for trained arms only"
    rank_by, weights = REWARDS[setting.reward]
    rule = RankingRule(rank_by, weights)
    columns = [score_column(name) for name in weights]
    table = pq.read_table(pool_dir / "samples.parquet", columns=["prompt_index", *columns]).sort_by("prompt_index")
    scores = np.stack([np.array(table[column].to_pylist()) for column in columns], axis=2)
    curriculum = Curriculum(rank_samples(rule.combine(scores)), arm.schedule, seed=seed)
    per_stage = setting.updates // NUM_STAGES * PAIRS_PER_UPDATE
    stages = [curriculum.plan(stage, per_stage)[0] for stage in range(1, NUM_STAGES + 1)]
    return stages[::-1] if arm.reversed else stages


def _sampling(world: World, seed: int, images: int) -> Sampling:
    return Sampling(seed, images, world.num_denoising_steps, world.guidance_scale, None, None, images_per_batch=32)


def read_records(path: Path) -> Records:
    """Finished runs of a file of JSON lines."""
    records: Records = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        run = json.loads(line)
        records[Setting(**run.pop("setting")), run.pop("arm"), run.pop("seed"), run.pop("pool")] = run
    return records


def append_record(path: Path, key: Key, run: Mapping[str, Any]) -> None:
    """Append a finished run."""
    setting, arm, seed, pool = key
    line = {"setting": asdict(setting), "arm": arm, "seed": seed, "pool": pool, **run}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def differences(records: Records, setting: Setting, arm: str, other: str, judge: str) -> NDArray[np.float64]:
    """``[run, prompt]`` scores of an arm minus those of another, of the seeds and pools that both have."""

    def runs_of(name: str) -> dict[tuple[int, int], Any]:
        return {(key[2], key[3]): run[judge] for key, run in records.items() if key[:2] == (setting, name)}

    mine, theirs = runs_of(arm), runs_of(other)
    if other == BASE:
        theirs = dict.fromkeys(mine, *theirs.values())
    return np.array([np.subtract(mine[run], theirs[run]) for run in sorted(mine) if run in theirs])


def findings(records: Records, setting: Setting) -> list[dict[str, Any]]:
    """One row per arm: means, differences to base, plain DPO and the paper's curriculum, and diagnostics."""
    rows = []
    for arm in ARMS:
        runs = [run for key, run in records.items() if key[:2] == (setting, arm)]
        if not runs:
            continue
        row: dict[str, Any] = {"arm": arm, "name": ARMS[arm].name, "runs": len(runs)}
        for judge in JUDGES:
            means = np.array([run[judge] for run in runs]).mean(axis=1)
            row[judge] = float(means.mean())
            row[f"{judge}_spread"] = float(means.std(ddof=1)) if len(runs) > 1 else None
            for other in (BASE, PLAIN, PAPER):
                compared = arm not in (BASE, other)
                found = differences(records, setting, arm, other, judge) if compared else np.empty(0)
                if len(found):
                    row[f"{judge}_to_{other}"] = asdict(mean_over_runs(found))
        for extra in ("rank_gap", "chosen_error_change", "rejected_error_change", "seconds"):
            values = [run[extra] for run in runs if extra in run]
            row[extra] = float(np.mean(values)) if values else None
        rows.append(row)
    return rows


def table(setting: Setting, rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, with the setting as its title."""
    head = (
        "arm", "runs", "attributes right", "to base", "to plain DPO", "to the paper's", "spread", "CLIP to base",
        "CLIP to plain DPO", "CLIP to the paper's", "mean rank gap", "chosen's error",
    )  # fmt: skip
    lines = [f"{title_of(setting)}:", "", f"| {' | '.join(head)} |", f"{'|---' * len(head)}|"]
    for row in rows:
        spread, gap, change = row["oracle_spread"], row["rank_gap"], row["chosen_error_change"]
        cells = [
            row["name"],
            str(row["runs"]),
            f"{row['oracle']:.3f}",
            *(_difference(row.get(f"oracle_to_{other}")) for other in (BASE, PLAIN, PAPER)),
            "" if spread is None else f"{spread:.3f}",
            *(_difference(row.get(f"clip_to_{other}")) for other in (BASE, PLAIN, PAPER)),
            "" if gap is None else f"{gap:.2f}",
            "" if change is None else f"{change:+.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def update_page(page: str, tables: Mapping[Setting, str]) -> str:
    """A Markdown page with its tables replaced, by their titles; new tables are appended."""
    for setting, new in tables.items():
        old = re.compile(rf"^{re.escape(title_of(setting))}:\n\n(?:\|.*\n?)+", re.MULTILINE)
        page = old.sub(f"{new}\n", page) if old.search(page) else f"{page}\n{new}\n"
    return page


def draw_figure(setting: Setting, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot each arm's difference to the base model and to plain DPO, with intervals if there are enough runs."""
    rows = [row for row in rows if row["arm"] != BASE]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 1.2 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for side, other, name in ((axes[0], BASE, "base model"), (axes[1], PLAIN, "plain DPO")):
            side.axvline(0, color=GREY, lw=0.9, ls="--")
            for height, row in enumerate(reversed(rows)):
                found = row.get(f"oracle_to_{other}")
                if found and "low" not in found:
                    side.plot(found["mean"], height, "o", color=GREY, markersize=5, fillstyle="none")
                elif found:
                    mean, low, high = found["mean"], found["low"], found["high"]
                    colour = BLUE if low > 0 else VERMILLION if high < 0 else GREY
                    reach = [[mean - low], [high - mean]]
                    side.errorbar(mean, height, xerr=reach, fmt="o", color=colour, capsize=3, markersize=5, lw=1.6)
            side.set_title(f"difference to {name}, 95 %")
            side.grid(visible=False, axis="y")
            side.locator_params(axis="x", nbins=5)
            side.set_ylim(-0.6, len(rows) - 0.4)
        axes[0].set_yticks(range(len(rows)), [f"{row['name']} ({row['runs']})" for row in reversed(rows)])
        figure.suptitle(f"attributes right: {title_of(setting)}", x=0.01, ha="left", fontsize=10)
        figure.savefig(path, dpi=160)


def title_of(setting: Setting) -> str:
    """One line about a table."""
    return (
        f"{setting.world} model, ranked by {setting.reward}, {setting.updates} updates,"
        f" {setting.heldout} held-out prompts x {setting.heldout_images}"
    )


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if "low" not in found:
        return f"{found['mean']:+.3f}"
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _compute(missing: Sequence[Key], pools_dir: Path, records: Path, num_processes: int) -> None:
    """Run what is missing, and append each run to the records."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes: two of one thread beat one of two
    folders = {key: pools_dir / f"{key[0].pool_name}-{key[3]}" for key in missing}
    needed = {folder: key for key, folder in folders.items() if not (folder / "samples.parquet").is_file()}
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as workers:
        made = [
            workers.submit(make_pool, folder, key[3], WORLDS[key[0].world], key[0]) for folder, key in needed.items()
        ]
        for task in tqdm(as_completed(made), total=len(made), desc="pools", unit="pool", disable=not made):
            task.result()
        tasks = {workers.submit(run_arm, key, folder): key for key, folder in folders.items()}
        for task in tqdm(as_completed(tasks), total=len(tasks), desc="ablation", unit="run"):
            append_record(records, tasks[task], task.result())


def _seeds(text: str) -> range:
    first, _, last = text.rpartition("-")
    return range(int(first), int(last) + 1) if first else range(int(last))


def main() -> None:
    """Run missing runs, then print the tables and draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=f"{PLAIN},{PAPER}", help=f"comma-separated, of: {', '.join(ARMS)}")
    parser.add_argument("--world", choices=WORLDS, default="diffusion")
    parser.add_argument("--reward", choices=REWARDS, default="clip")
    parser.add_argument("--seeds", type=_seeds, default=range(4), help="number of seeds, or first-last")
    parser.add_argument("--pools", type=int, default=2, help="number of sample sets: seed s trains on s mod this")
    parser.add_argument("--updates", type=int, default=200, help="updates of all stages; 16 pairs each")
    parser.add_argument("--prompts", type=int, default=128, help="number of training prompts")
    parser.add_argument("--images", type=int, default=8, help="images per training prompt")
    parser.add_argument("--heldout", type=int, default=96, help="number of held-out prompts")
    parser.add_argument("--heldout-images", type=int, default=4, help="images per held-out prompt")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--records", type=Path, default=Path("benchmarks/ablation.jsonl"), help="file of finished runs")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/ablation"), help="folder of samples and figures")
    parser.add_argument("--table", action="store_true", help="run nothing; print all tables of the records")
    parser.add_argument("--page", type=Path, help="Markdown file whose tables are replaced by the printed ones")
    options = parser.parse_args()
    arms = options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"unknown arms {', '.join(unknown)}; known: {', '.join(ARMS)}")
    if foreign := [arm for arm in arms if ARMS[arm].world not in (None, options.world)]:
        parser.error(f"arms that need --world {ARMS[foreign[0]].world}: {', '.join(foreign)}")
    sizes = {name: getattr(options, name) for name in ("updates", "prompts", "images", "heldout", "heldout_images")}
    setting, done = Setting(options.world, options.reward, **sizes), read_records(options.records)
    if not options.table:
        wanted: list[Key] = [(setting, BASE, 0, 0)]  # neither a seed of training nor a pool
        wanted += [(setting, arm, seed, seed % options.pools) for seed in options.seeds for arm in arms if arm != BASE]
        missing = [key for key in wanted if key not in done]
        _compute(missing, options.work_dir, options.records, options.processes)
        done = read_records(options.records)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    tables = {}
    for shown in dict.fromkeys(key[0] for key in done) if options.table else [setting]:
        rows = findings(done, shown)
        tables[shown] = table(shown, rows)
        print(f"\n{tables[shown]}")
        draw_figure(shown, rows, options.work_dir / f"{shown.world}-{shown.reward}-{shown.updates}.png")
    if options.page:
        options.page.write_text(update_page(options.page.read_text(), tables))


if __name__ == "__main__":
    main()

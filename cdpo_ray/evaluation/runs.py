"""Evaluated runs -> one comparison of what they trained: `compare.json` and `compare.html`; nothing is generated."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from cdpo_ray.errors import StoreError
from cdpo_ray.evaluation.appearance import APPEARANCE
from cdpo_ray.evaluation.metrics import preference_accuracy
from cdpo_ray.evaluation.page import (
    HERE,
    aligned,
    inlined,
    relative_change,
    significant_change,
    spoken_difference,
    spoken_share,
    write_page,
)
from cdpo_ray.evaluation.report import DIVERSITY, read_config, read_json, read_table, trained_on
from cdpo_ray.evaluation.statistics import Scores, compare
from cdpo_ray.generation.images import decode_png
from cdpo_ray.records import ARMS, EVALUATION, IMPLICIT_VALUE, score_column
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.store import RunFolder, flat, make_folder, table_schema, write_json

BASE = "base model"
COMPARABLE_BY = (
    "run.seed",
    "model.family",
    "model.path",
    "model.revision",
    "model.dtype",
    "generation.num_denoising_steps",
    "generation.guidance_scale",
    "generation.height",
    "generation.width",
    "evaluation.images_per_prompt",
)
"""Settings that decide which images the base model makes: alike, or the runs were not put to the same test."""
SHOWN_PROMPTS, SHOWN_IMAGES = 8, 2


@dataclass(frozen=True)
class EvaluatedRun:
    """What `5-evaluation` of one run holds, without its images.

    Attributes:
        name: what it is called beside the others.
        trained_on: the reward that ranked its pairs.
        settings: of its evaluation, flat.
        judges: keyword arguments of the class of each.
        rows: a row an image, in prompt and sample order.
    """

    name: str
    path: Path
    trained_on: str
    settings: dict[str, Any]
    judges: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    rows: pa.Table

    @property
    def comparison_path(self) -> Path:
        return self.path / EVALUATION / "comparison.parquet"

    @property
    def prompts(self) -> list[str]:
        prompts: list[str] = self.rows["prompt"].to_pylist()
        return prompts[:: self.metrics["images_per_prompt"]]

    def values(self, column: str) -> Scores:
        """``[prompt, image]`` of a column."""
        found = np.array(self.rows[column].to_pylist(), dtype=float)
        return found.reshape(-1, self.metrics["images_per_prompt"])

    def scores(self, arm: str, judge: str) -> Scores:
        return self.values(f"{arm}_{score_column(judge)}")


def compare_runs(run_dirs: Sequence[Path], output_dir: Path) -> dict[str, Any]:
    """Compare what several runs trained, on the images that each of their evaluations kept.

    A judge that one run has and another lacks scores the latter's images now, in this process.

    Args:
        run_dirs: `runs/<name>`, or a round's folder within it, each with a finished evaluation.
        output_dir: where `compare.json` and `compare.html` go.

    Returns:
        The content of `compare.json`.

    Raises:
        StoreError: a run is not evaluated or is damaged, two were not put to the same test, or ``output_dir`` cannot be
            written.
        RewardError: a missing judge cannot be loaded, or fails.
    """
    runs = [read_run(run_dir, name) for run_dir, name in zip(run_dirs, names_of(run_dirs), strict=True)]
    for other in runs[1:]:
        refuse_incomparable(runs[0], other)
    judges = {judge: options for run in reversed(runs) for judge, options in run.judges.items()}
    judges = {judge: judges[judge] for run in runs for judge in run.judges}  # in the order of the first that has each
    scored_now = {run.name: [judge for judge in judges if judge not in run.judges] for run in runs}
    runs = [with_scores(run, {judge: judges[judge] for judge in scored_now[run.name]}) for run in runs]
    found = measure_runs(runs, list(judges)) | {"scored_now": scored_now}
    make_folder(output_dir)
    write_json(output_dir / "compare.json", found)
    write_page(output_dir / "compare.html", HERE / "compare.html.jinja", grid=image_grid(runs), **spoken(found))
    return found


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """Folder names, of rounds with the run's; whole paths where those are not distinct.

    Raises:
        StoreError: a folder is given twice.
    """
    resolved = [run_dir.resolve() for run_dir in run_dirs]
    for run_dir, path in zip(run_dirs, resolved, strict=True):
        if resolved.count(path) > 1:
            raise StoreError(f"compare: {run_dir} is given twice; name each run once")
    names = [f"{path.parent.name}/{path.name}" if path.name.startswith("round-") else path.name for path in resolved]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]


def read_run(run_dir: Path, name: str) -> EvaluatedRun:
    """Read what a finished evaluation kept, all but the images.

    Raises:
        StoreError: it is not there or is damaged.
    """
    run = RunFolder(run_dir)
    if not run.has(EVALUATION) and run.path.is_dir() and (rounds := sorted(run.path.glob("round-*"))):
        raise StoreError(f"{run_dir}: has rounds; give the folder of one, for example {rounds[-1]}")
    run.refuse_damage(EVALUATION)
    settings = run.manifest(EVALUATION)["settings"]
    path = run_dir / EVALUATION / "comparison.parquet"
    kept = [column for column in table_schema(path).names if not column.endswith("_image")]
    rows = read_table(path, kept).sort_by([("prompt_index", "ascending"), ("sample_index", "ascending")])
    return EvaluatedRun(
        name,
        run_dir,
        trained_on(read_config(run_dir)),
        flat(settings),
        {judge: settings[f"rewards.{judge}"] for judge in settings["evaluation"]["judges"]},
        read_json(run_dir / EVALUATION / "metrics.json"),
        rows,
    )


def refuse_incomparable(one: EvaluatedRun, other: EvaluatedRun) -> None:
    """Refuse two runs that were not put to the same test: other images asked for, or a judge set up otherwise.

    Raises:
        StoreError: with every key that differs.
    """
    common = [f"rewards.{judge}." for judge in one.judges if judge in other.judges]
    keys = [
        key for key in sorted({*one.settings, *other.settings}) if key in COMPARABLE_BY or key.startswith(tuple(common))
    ]
    differences = [
        f"`{key}` is {one.settings.get(key)} and {other.settings.get(key)}"
        for key in keys
        if one.settings.get(key) != other.settings.get(key)
    ]
    if one.prompts != other.prompts:
        differences.append(f"`prompts.heldout` gives {_prompts_differ(one.prompts, other.prompts)}")
    if differences:
        raise StoreError(
            f"compare: {one.path} and {other.path} were not put to the same test: {'; '.join(differences)};"
            " evaluate one of them again, or leave it out"
        )


def with_scores(run: EvaluatedRun, judges: Mapping[str, Mapping[str, Any]]) -> EvaluatedRun:
    """The run with columns of judges that its evaluation did not have, scored from the images that it kept.

    Args:
        judges: keyword arguments of the class of each.
    """
    if not judges:
        return run
    scorer = Scorer(judges)
    columns = ["prompt_index", "sample_index", "prompt", *(f"{arm}_image" for arm in ARMS)]
    scored: dict[str, list[float]] = {f"{arm}_{score_column(judge)}": [] for arm in ARMS for judge in judges}
    places: list[tuple[int, int]] = []
    num_images = len(ARMS) * run.rows.num_rows
    with (
        run.comparison_path.open("rb") as opened,
        pq.ParquetFile(opened) as file,
        tqdm(total=num_images, desc=run.name, disable=None) as bar,
    ):
        for batch in file.iter_batches(run.settings["generation.images_per_batch"], columns=columns):
            places += zip(batch["prompt_index"].to_pylist(), batch["sample_index"].to_pylist(), strict=True)
            for arm in ARMS:
                images = np.stack([decode_png(png) for png in batch[f"{arm}_image"].to_pylist()])
                for judge, scores in scorer(torch.from_numpy(images), batch["prompt"].to_pylist()).items():
                    scored[f"{arm}_{score_column(judge)}"] += scores.tolist()
                bar.update(len(images))
    order = np.lexsort(np.array(places).T[::-1])  # as `rows` are sorted
    rows = run.rows
    for column, values in scored.items():
        rows = rows.append_column(column, pa.array(np.array(values)[order]))
    return replace(run, rows=rows)


def measure_runs(runs: Sequence[EvaluatedRun], judges: Sequence[str]) -> dict[str, Any]:
    """The numbers of `compare.json`; intervals are of a bootstrap over prompts, by the first run's settings.

    Returns:
        `arms`: names of the runs, then the base model (its images are the first run's).
        `scores`: by run and judge, a `Comparison` with the base from the same noise.
        `win_rates`: by judge, ``[arm][arm]``, how often the row's image is better than the column's from the same
        noise; a tie counts one half; none on the diagonal.
        `appearance`: by run and measure, diversity among them, as its evaluation found it.
        `preference_accuracy`: by run and judge, as in `metrics.preference_accuracy`.
    """
    seed = runs[0].settings["run.seed"]
    num_resamples = runs[0].settings["evaluation.num_bootstrap_resamples"]

    def win_rate(row: Scores, column: Scores) -> dict[str, float]:
        return asdict(compare(column, row, num_resamples=num_resamples, seed=seed).win_rate)

    scores: dict[str, dict[str, Any]] = {run.name: {} for run in runs}
    win_rates: dict[str, list[list[Any]]] = {}
    for judge in judges:
        arms = [*(run.scores("tuned", judge) for run in runs), runs[0].scores("base", judge)]
        win_rates[judge] = [
            [None if row == column else win_rate(arms[row], arms[column]) for column in range(len(arms))]
            for row in range(len(arms))
        ]
        for run, tuned in zip(runs, arms, strict=False):
            compared = compare(run.scores("base", judge), tuned, num_resamples=num_resamples, seed=seed)
            scores[run.name][judge] = compared.to_dict()
    return {
        "runs": [{"name": run.name, "path": str(run.path), "trained_on": run.trained_on} for run in runs],
        "arms": [*(run.name for run in runs), BASE],
        "judges": list(judges),
        "num_prompts": len(runs[0].prompts),
        "images_per_prompt": runs[0].metrics["images_per_prompt"],
        "scores": scores,
        "win_rates": win_rates,
        "appearance": {
            run.name: {name: run.metrics[name] for name in (DIVERSITY,) if name in run.metrics}
            | run.metrics.get("appearance", {})
            for run in runs
        },
        "preference_accuracy": {
            run.name: {
                judge: preference_accuracy(
                    run.values(IMPLICIT_VALUE), run.scores("base", judge), num_resamples=num_resamples, seed=seed
                )
                for judge in judges
            }
            for run in runs
            if IMPLICIT_VALUE in run.rows.column_names
        },
    }


def spoken(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of `compare.json` with what the page shows of them as text."""

    def cell(comparison: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if comparison is None:
            return None
        relative = relative_change(comparison)
        return spoken_difference(comparison) | {
            "change": significant_change(comparison),
            "per_cent": f"{100 * relative['mean']:+.2g} %".replace("-", "−") if relative else None,
        }

    def share(interval: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if interval is None:
            return None
        mean, ends = spoken_share(interval)
        above = int(interval["low"] > 0.5) - int(interval["high"] < 0.5)
        return {"mean": mean, "interval": ends, "change": above, "strength": round(200 * abs(interval["mean"] - 0.5))}

    names, measures = [run["name"] for run in found["runs"]], [DIVERSITY, *APPEARANCE]
    return dict(found) | {
        "score_rows": [[cell(found["scores"][name][judge]) for judge in found["judges"]] for name in names],
        "measures": measures,
        "appearance_rows": [[cell(found["appearance"][name].get(measure)) for measure in measures] for name in names],
        "accuracy_rows": [
            [share(found["preference_accuracy"].get(name, {}).get(judge)) for judge in found["judges"]]
            for name in names
        ],
        "win_rate_rows": {
            judge: [[share(interval) for interval in row] for row in matrix]
            for judge, matrix in found["win_rates"].items()
        },
    }


def table_of(found: Mapping[str, Any]) -> str:
    """What the terminal shows: a row a run, a column a judge; mean score, and its difference to the base."""
    told = spoken(found)
    header = ["run", "trained on", *found["judges"]]
    first = told["score_rows"][0]
    rows = [[BASE, "", *(cell["base"] for cell in first)]]
    for run, cells in zip(found["runs"], told["score_rows"], strict=True):
        shown = [f"{cell['tuned']} ({cell['difference']} {cell['interval']})" for cell in cells]
        rows.append([run["name"], run["trained_on"], *shown])
    return aligned([header, *rows])


def image_grid(runs: Sequence[EvaluatedRun]) -> list[dict[str, Any]]:
    """The first held-out prompts: each with its text and an entry an arm, its images from the same noise."""
    grid: list[dict[str, Any]] = [
        {"prompt": prompt, "arms": [{"name": name, "images": []} for name in (BASE, *(run.name for run in runs))]}
        for prompt in runs[0].prompts[:SHOWN_PROMPTS]
    ]
    first = runs[0].rows["prompt_index"].unique().to_pylist()[:SHOWN_PROMPTS]  # those set aside have no row
    places = {prompt_index: place for place, prompt_index in enumerate(first)}
    for place, (run, arm) in enumerate([(runs[0], "base"), *((run, "tuned") for run in runs)]):
        column = f"{arm}_image"
        few = [("prompt_index", "in", list(places)), ("sample_index", "<", SHOWN_IMAGES)]
        rows = read_table(run.comparison_path, ["prompt_index", "sample_index", column], few)
        for row in rows.sort_by([("prompt_index", "ascending"), ("sample_index", "ascending")]).to_pylist():
            where = f"{run.comparison_path}: image {row['sample_index']} of prompt {row['prompt_index']}"
            grid[places[row["prompt_index"]]]["arms"][place]["images"].append(inlined(row[column], where))
    return grid


def _prompts_differ(one: Sequence[str], other: Sequence[str]) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} prompts"
    place = next(index for index, prompts in enumerate(zip(one, other, strict=True)) if len(set(prompts)) > 1)
    return f"other prompts: number {place + 1} is {one[place]!r} and {other[place]!r}"

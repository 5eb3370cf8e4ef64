"""Evaluated runs -> one comparison of their models: `compare.json` and `compare.html`; generates no images."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, Field, ValidationError
from tqdm import tqdm
from typing_extensions import TypedDict

from cdpo_ray.config import REWARDS, options_without_choices, ranking_weights
from cdpo_ray.dataflow.images import decode_pngs
from cdpo_ray.errors import RewardError, StoreError, printable
from cdpo_ray.evaluation.appearance import APPEARANCE
from cdpo_ray.evaluation.metrics import by_category, preference_accuracy
from cdpo_ray.evaluation.report import (
    DIVERSITY,
    METRICS,
    JudgeName,
    MeasureResult,
    category_rows,
    check_comparison,
    in_order,
    measure_results,
    place_of,
    read_config,
    read_record,
    read_table,
    signs_of_reward_hacking,
    trained_on,
)
from cdpo_ray.evaluation.statistics import Scores, compare_scores
from cdpo_ray.pages.page import (
    align_columns,
    direction,
    formatted_difference,
    formatted_share,
    inline_png,
    reasons_without_interval,
    relative_change,
    significant_change,
    write_page,
)
from cdpo_ray.records import ARMS, CATEGORY, EVALUATION, IMPLICIT_VALUE, TRAINING, score_column
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.store import MANIFEST, RunFolder, differences, flat, is_local, make_folder, table_schema, write_json
from cdpo_ray.store.untrusted import Count, damage_message, other_keys_allowed

log = logging.getLogger(__name__)
BASE = "base model"
COMPARABLE_BY = (
    "run.seed",
    "model.family",
    "model.path",
    "model.revision",
    "model.sha256",
    "model.config.path",
    "model.config.revision",
    "model.config.sha256",
    "model.dtype",
    "model.quantization",
    "generation.num_denoising_steps",
    "generation.guidance_scale",
    "generation.height",
    "generation.width",
    "evaluation.images_per_prompt",
)
"""Settings that determine the images of the base model; runs are comparable only if these are equal."""
SHOWN_PROMPTS, SHOWN_IMAGES = 8, 2


@other_keys_allowed
class _Evaluation(TypedDict):
    judges: Annotated[list[JudgeName], Field(min_length=1, max_length=100)]
    images_per_prompt: Annotated[int, Field(ge=1, le=10_000)]
    num_bootstrap_resamples: Annotated[int, Field(ge=1, le=100_000)]


@other_keys_allowed
class _Generation(TypedDict):
    images_per_batch: Annotated[int, Field(ge=1, le=4096)]


class _Settings(BaseModel):
    """Settings of an evaluation that are used here; the others are only compared and shown."""

    seed: Annotated[Count, Field(alias="run.seed")]
    generation: _Generation
    evaluation: _Evaluation


@dataclass(frozen=True)
class EvaluatedRun:
    """`5-evaluation` of one run, without its images.

    Attributes:
        name: display name, distinct among the compared runs.
        trained_on: reward that ranked the pairs; see `report.trained_on`. Empty: unknown.
        rewards: `names`, `rank_by` and `weights` of the configuration; `None`: unknown.
        settings: flat settings of the evaluation.
        judges: by name, the keyword arguments of the judge's class.
        rows: one row per image, in prompt and sample order.
        is_paired: its images are from the same noise as those of the others.
    """

    name: str
    path: Path
    trained_on: str
    rewards: Mapping[str, Any] | None
    settings: dict[str, Any]
    judges: dict[str, dict[str, Any]]
    metrics: dict[str, Any]
    rows: pa.Table
    is_paired: bool = True

    @property
    def comparison_path(self) -> Path:
        return self.path / EVALUATION / "comparison.parquet"

    @property
    def prompts(self) -> list[str]:
        prompts: list[str] = self.rows["prompt"].to_pylist()
        return prompts[:: self.metrics["images_per_prompt"]]

    def values(self, column: str) -> Scores:
        """``[prompt, image]`` values of a column."""
        values = np.array(self.rows[column].to_pylist(), dtype=float)
        return values.reshape(-1, self.metrics["images_per_prompt"])

    def scores(self, arm: str, judge: str) -> Scores:
        return self.values(f"{arm}_{score_column(judge)}")

    def images(self, arm: str, prompts: Sequence[int], num_images: int) -> Iterator[tuple[int, bytes, str]]:
        """Yield index of the prompt, PNG and place of the first images of some prompts, in order."""
        column = f"{arm}_image"
        shown_rows = [("prompt_index", "in", list(prompts)), ("sample_index", "<", num_images)]
        rows = read_table(self.comparison_path, ["prompt_index", "sample_index", column], shown_rows)
        for row in in_order(rows).to_pylist():
            yield row["prompt_index"], row[column], place_of(self.comparison_path, row)


def compare_runs(
    run_dirs: Sequence[Path], output_dir: Path, own_judges: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Compare the models of several runs on the images that their evaluations stored.

    If only some runs were scored by a judge, it scores the images of the others now, in this process, provided that its
    recorded options choose no address, environment variable, file, model or code: a run may come from someone else.
    Otherwise the judge is left out, unless ``own_judges`` has it.

    Args:
        run_dirs: run folders, `runs/<name>`, or folders of rounds within them, each with a finished evaluation.
        output_dir: folder of `compare.json` and `compare.html`.
        own_judges: judges of the user's own configuration: by name, the keyword arguments of the judge's class.

    Returns:
        Content of `compare.json`.

    Raises:
        StoreError: a run is not evaluated or is damaged, two runs are not comparable, no judge is left, or
            ``output_dir`` cannot be written.
        RewardError: a missing judge cannot be loaded, fails, or would be imported from a run's folder.
    """
    runs = [read_run(run_dir, name) for run_dir, name in zip(run_dirs, names_of(run_dirs), strict=True)]
    for other in runs[1:]:
        refuse_incomparable(runs[0], other)
    options, left_out = options_of_missing(runs, own_judges or {})
    judges = [judge for judge in dict.fromkeys(judge for run in runs for judge in run.judges) if judge not in left_out]
    if not judges:
        raise StoreError(f"compare: no judge is left; {' '.join(left_out.values())}")
    _refuse_code_of_runs(options, run_dirs)
    scored_now = {run.name: [judge for judge in judges if judge not in run.judges] for run in runs}
    runs = [with_scores(run, {judge: options[judge] for judge in scored_now[run.name]}) for run in runs]
    try:
        found = measure_runs(runs, judges) | {"scored_now": scored_now, "left_out": left_out}
    except ValueError as error:  # a judge without finite scores
        raise StoreError(f"compare: {error}") from None
    write_comparison(found, runs, output_dir, "compare", kind="run")
    return found


def write_comparison(
    found: Mapping[str, Any], runs: Sequence[EvaluatedRun], output_dir: Path, name: str, *, kind: str
) -> None:
    """Write `<name>.json` and `<name>.html`.

    Args:
        found: content of the JSON file.
        kind: what a row of the page's tables is, in one word.
    """
    make_folder(output_dir)
    write_json(output_dir / f"{name}.json", found)
    write_page(
        output_dir / f"{name}.html",
        Path(__file__).with_name("compare.html.jinja"),
        kind=kind,
        own={run.name: ranking_weights(run.rewards) if run.rewards else () for run in runs},
        grid=image_grid(runs, found["arms"][-1]),
        **page_values(found),
    )


def options_of_missing(
    runs: Sequence[EvaluatedRun], own_judges: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Options of the judges that only some runs have.

    Args:
        own_judges: as in `compare_runs`; their options are trusted.

    Returns:
        options: by judge, the keyword arguments of its class.
        left_out: by judge that cannot be used, a sentence with the reason.
    """
    options: dict[str, Mapping[str, Any]] = {}
    left_out: dict[str, str] = {}
    for judge, recorded in [pair for run in runs for pair in run.judges.items()]:
        lacking = [run.name for run in runs if judge not in run.judges]
        if not lacking or judge in options or judge in left_out:
            continue
        if judge in own_judges:
            options[judge] = own_judges[judge]
            if changed := differences(recorded, own_judges[judge]):
                log.warning("compare: `%s` has other options than in the run: %s", judge, printable(changed, 1000))
            continue
        try:
            options[judge] = options_without_choices(judge, recorded)
        except ValueError as reason:
            left_out[judge] = (
                f"`{judge}` is left out: {', '.join(map(printable, lacking))} lacks its scores, and it {reason};"
                " pass `--judges CONFIG`, a configuration of your own that names it."
            )
    return options, left_out


def _refuse_code_of_runs(options: Mapping[str, Any], run_dirs: Sequence[Path]) -> None:
    """Refuse to import custom rewards from a compared run's folder, whose files may come from someone else.

    Raises:
        RewardError: a custom reward is used, and the working directory is within a run's folder.
    """
    own = [judge for judge in options if judge not in REWARDS]
    here = Path.cwd().resolve()
    if own and any(is_local(run_dir) and here.is_relative_to(run_dir.resolve()) for run_dir in run_dirs):
        raise RewardError(
            f"reward `{own[0]}`: would be imported from {here}, the folder of a compared run; start the command in a"
            " folder of your own"
        )


def names_of(run_dirs: Sequence[Path]) -> list[str]:
    """Folder names of the runs, `<run>/round-<number>` for rounds; paths if the names are not distinct.

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
    """Read a finished evaluation without its images.

    Raises:
        StoreError: the evaluation is missing or damaged.
    """
    run = RunFolder(run_dir, foreign=True)
    if not run.has(EVALUATION) and run.path.is_dir() and (rounds := sorted(run.path.glob("round-*"))):
        raise StoreError(f"{run_dir}: has rounds; give the folder of one, for example {printable(rounds[-1], 1000)}")
    run.refuse_damage(EVALUATION)
    if run.has(TRAINING):
        try:
            run.refuse_damage(TRAINING, read_up_to=0)
        except StoreError as error:  # the adapter is not needed here
            log.warning("compare: %s", printable(error, 1000))
    settings, judges = _settings_of(run)
    metrics = read_record(run_dir / EVALUATION / "metrics.json", METRICS)
    path = run_dir / EVALUATION / "comparison.parquet"
    check_comparison(path, list(judges))
    columns = [column for column in table_schema(path).names if not column.endswith("_image")]
    rows = in_order(read_table(path, columns))
    num_images = settings["evaluation.images_per_prompt"]
    if metrics["images_per_prompt"] != num_images or not _has_images_of_each_prompt(rows, num_images):
        raise StoreError(f"{path}: must have {num_images} rows of each prompt; delete {path.parent}, do not use it")
    config = read_config(run)
    return EvaluatedRun(name, run_dir, trained_on(config), config["rewards"], settings, judges, metrics, rows)


def _settings_of(run: RunFolder) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Flat settings of an evaluation, and the recorded options of each judge."""
    settings, where = run.manifest(EVALUATION)["settings"], run.path / EVALUATION / MANIFEST
    remedy = f"delete {where.parent}, do not use it"
    try:
        _Settings.model_validate(settings, strict=True)
    except ValidationError as error:
        raise StoreError(damage_message(error, where=str(where), remedy=remedy)) from None
    judges = {judge: settings.get(f"rewards.{judge}") for judge in settings["evaluation"]["judges"]}
    if unknown := [judge for judge, options in judges.items() if not isinstance(options, dict)]:
        raise StoreError(f"{where}: is damaged (no options of `{unknown[0]}`); {remedy}")
    return flat(settings), judges


def _has_images_of_each_prompt(rows: pa.Table, num_images: int) -> bool:
    prompts, samples = rows["prompt_index"].to_numpy(), rows["sample_index"].to_numpy()
    if len(prompts) % num_images:
        return False
    prompts, samples = prompts.reshape(-1, num_images), samples.reshape(-1, num_images)
    return bool((prompts == prompts[:, :1]).all() and (samples == np.arange(num_images)).all())


def refuse_incomparable(one: EvaluatedRun, other: EvaluatedRun) -> None:
    """Refuse two runs with different base images, prompts, or options of a common judge.

    Raises:
        StoreError: the runs differ; names every key.
    """
    common = [f"rewards.{judge}." for judge in one.judges if judge in other.judges]
    keys = [
        key for key in sorted({*one.settings, *other.settings}) if key in COMPARABLE_BY or key.startswith(tuple(common))
    ]
    differences = [
        f"`{printable(key)}` is {printable(one.settings.get(key))} and {printable(other.settings.get(key))}"
        for key in keys
        if one.settings.get(key) != other.settings.get(key)
    ]
    if one.prompts != other.prompts:
        differences.append(f"`prompts.heldout` gives {_prompts_differ(one.prompts, other.prompts)}")
    if differences:
        raise StoreError(
            f"compare: {one.path} and {other.path} are not comparable: {'; '.join(differences)};"
            " evaluate one of them again, or leave it out"
        )


def with_scores(run: EvaluatedRun, judges: Mapping[str, Mapping[str, Any]]) -> EvaluatedRun:
    """The run with score columns of further judges, computed from its stored images.

    Args:
        judges: by name, the keyword arguments of the judge's class.

    Raises:
        StoreError: an image is not a PNG, or has another size than the others.
        RewardError: a judge cannot be loaded, or fails.
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
            here = list(zip(batch["prompt_index"].to_pylist(), batch["sample_index"].to_pylist(), strict=True))
            places += here
            for arm in ARMS:
                where = [f"{run.comparison_path}: {arm} image {image} of prompt {prompt}" for prompt, image in here]
                images = decode_pngs(batch[f"{arm}_image"].to_pylist(), where)
                for judge, scores in scorer(torch.from_numpy(images), batch["prompt"].to_pylist()).items():
                    scored[f"{arm}_{score_column(judge)}"] += scores.tolist()
                bar.update(len(images))
    order = np.lexsort(np.array(places).T[::-1])  # the order of `rows`
    rows = run.rows
    for column, values in scored.items():
        rows = rows.append_column(column, pa.array(np.array(values)[order]))
    return replace(run, rows=rows)


def measure_runs(
    runs: Sequence[EvaluatedRun], judges: Sequence[str], reference: str = BASE, *, reference_is_paired: bool = True
) -> dict[str, Any]:
    """The numbers of `compare.json`, with intervals by bootstrap over prompts with the first run's settings.

    Images are paired with those from the same noise. If either side's are from another noise, differences are paired by
    prompt alone, and each image is compared with every one of the same prompt.

    Args:
        reference: name of the base images.
        reference_is_paired: whether they are from the same noise as the others.

    Returns:
        `runs`: `name`, `path`, `trained_on` (empty: unknown) and `same_noise` of each.
        `arms`: names of the runs, then the reference (with the first run's images).
        `scores`: by run and judge, a `Comparison` with the reference.
        `categories`: by run whose prompts have categories, see `metrics.by_category`.
        `win_rates`: by judge, ``[arm][arm]``, how often the row's image scores higher than the column's; a tie counts
        one half; `None` on the diagonal.
        `appearance`: by run and measure, including diversity, a `Comparison` from the run's evaluation.
        `signs_of_reward_hacking`: by run that has any, see `report.signs_of_reward_hacking`, in words.
        `preference_accuracy`: by run and judge, see `metrics.preference_accuracy`.

    Raises:
        ValueError: a judge has no image with a finite score of both arms.
    """
    seed = runs[0].settings["run.seed"]
    num_resamples = runs[0].settings["evaluation.num_bootstrap_resamples"]

    def matched(base: Scores, tuned: Scores, *, is_paired: bool) -> tuple[Scores, Scores]:
        """Images that are compared with each other; without pairs, every one of a prompt with every other."""
        if is_paired:
            return base, tuned
        return np.repeat(base, tuned.shape[1], axis=1), np.tile(tuned, base.shape[1])

    def compared(base: Scores, tuned: Scores) -> dict[str, Any]:
        return compare_scores(base, tuned, num_resamples=num_resamples, seed=seed).to_dict()

    def beside_reference(run: EvaluatedRun, judge: str) -> dict[str, Scores]:
        is_paired = run.is_paired and reference_is_paired
        base, tuned = matched(run.scores("base", judge), run.scores("tuned", judge), is_paired=is_paired)
        return {"base": base, "tuned": tuned}

    paired = [*(run.is_paired for run in runs), reference_is_paired]

    scores: dict[str, dict[str, Any]] = {}
    categories: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        arms = {judge: beside_reference(run, judge) for judge in judges}
        scores[run.name] = {judge: compared(**sides) for judge, sides in arms.items()}
        if CATEGORY in run.rows.column_names:
            of_prompts = run.rows[CATEGORY].to_pylist()[:: run.metrics["images_per_prompt"]]
            categories[run.name] = by_category(arms, of_prompts, num_resamples=num_resamples, seed=seed)
    win_rates: dict[str, list[list[Any]]] = {}
    for judge in judges:
        every = [*(run.scores("tuned", judge) for run in runs), runs[0].scores("base", judge)]
        win_rates[judge] = [
            [
                None
                if row == column
                else compared(*matched(every[column], every[row], is_paired=paired[row] and paired[column]))["win_rate"]
                for column in range(len(every))
            ]
            for row in range(len(every))
        ]
    looks = {
        run.name: {name: run.metrics[name] for name in (DIVERSITY,) if name in run.metrics}
        | run.metrics.get("appearance", {})
        for run in runs
    }
    return {
        "runs": [
            {"name": run.name, "path": str(run.path), "trained_on": run.trained_on, "same_noise": run.is_paired}
            for run in runs
        ],
        "arms": [*(run.name for run in runs), reference],
        "judges": list(judges),
        "num_prompts": len(runs[0].prompts),
        "num_left_out": 0,
        "images_per_prompt": runs[0].metrics["images_per_prompt"],
        "scores": scores,
        "categories": categories,
        "win_rates": win_rates,
        "appearance": looks,
        "signs_of_reward_hacking": {
            run.name: [f"{sign.name} {sign.verdict}" for sign in signs]
            for run in runs
            if (signs := _signs(run, scores[run.name], looks[run.name]))
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


def _signs(run: EvaluatedRun, judges: Mapping[str, Any], looks: Mapping[str, Any]) -> list[MeasureResult]:
    return signs_of_reward_hacking(measure_results({"judges": judges, "appearance": looks}, run.rewards))


def page_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `compare.json`, and its numbers formatted as text in the order of the page's tables."""

    def cell(comparison: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if comparison is None:
            return None
        relative = relative_change(comparison)
        return formatted_difference(comparison) | {
            "change": significant_change(comparison),
            "per_cent": f"{100 * relative['mean']:+.2g} %".replace("-", "−") if relative else None,
        }

    def share(estimate: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if estimate is None:
            return None
        mean, ends = formatted_share(estimate)
        return {
            "mean": mean,
            "interval": ends,
            "change": direction(estimate, neutral=0.5),
            "strength": round(200 * abs(estimate["mean"] - 0.5)),
        }

    names, measures = [run["name"] for run in found["runs"]], [DIVERSITY, *APPEARANCE]
    return dict(found) | {
        "score_rows": [[cell(found["scores"][name][judge]) for judge in found["judges"]] for name in names],
        "category_rows": _category_rows(found, names),
        "measures": measures,
        "appearance_rows": [[cell(found["appearance"][name].get(measure)) for measure in measures] for name in names],
        "accuracy_rows": [
            [share(found["preference_accuracy"].get(name, {}).get(judge)) for judge in found["judges"]]
            for name in names
        ],
        "win_rate_rows": {
            judge: [[share(estimate) for estimate in row] for row in matrix]
            for judge, matrix in found["win_rates"].items()
        },
        "no_interval": reasons_without_interval(
            [found[part] for part in ("scores", "win_rates", "appearance", "preference_accuracy")]
        ),
    }


def _category_rows(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """By judge, rows of a table with one cell per run; only categories that all runs have."""
    tables = {name: category_rows(found["categories"].get(name, []), found["judges"]) for name in names}
    rows = [{row["category"]: row for row in table} for table in tables.values()]
    common = [category for category in rows[0] if all(category in each for each in rows)]
    return {
        judge: [rows[0][category] | {"cells": [each[category]["cells"][place] for each in rows]} for category in common]
        for place, judge in enumerate(found["judges"])
        if common
    }


def table_of(found: Mapping[str, Any]) -> str:
    """Table for the terminal: one row per run, one column per judge; mean score and its difference to the base.

    Without intervals, a last line says why.
    """
    score_rows = page_values(found)["score_rows"]
    header = ["run", "trained on", *found["judges"]]
    rows = [[found["arms"][-1], "", *(cell["base"] for cell in score_rows[0])]]
    for run, cells in zip(found["runs"], score_rows, strict=True):
        shown = [f"{cell['tuned']} ({cell['difference']} {cell['interval']})" for cell in cells]
        rows.append([run["name"], run["trained_on"], *shown])
    table, reasons = align_columns([header, *rows]), reasons_without_interval(found["scores"])
    return f"{table}\nno interval and no verdict: {'; '.join(reasons)}; add held-out prompts" if reasons else table


def image_grid(runs: Sequence[EvaluatedRun], reference: str = BASE) -> list[dict[str, Any]]:
    """The first held-out prompts: text, and one entry per arm with its images from the same noise."""
    grid: list[dict[str, Any]] = [
        {"prompt": prompt, "arms": [{"name": name, "images": []} for name in (reference, *(run.name for run in runs))]}
        for prompt in runs[0].prompts[:SHOWN_PROMPTS]
    ]
    first = runs[0].rows["prompt_index"].unique().to_pylist()[:SHOWN_PROMPTS]  # prompts in quarantine have no row
    places = {prompt_index: place for place, prompt_index in enumerate(first)}
    for place, (run, arm) in enumerate([(runs[0], "base"), *((run, "tuned") for run in runs)]):
        for prompt_index, png, where in run.images(arm, [*places], SHOWN_IMAGES):
            grid[places[prompt_index]]["arms"][place]["images"].append(inline_png(png, where))
    return grid


def _prompts_differ(one: Sequence[str], other: Sequence[str]) -> str:
    if len(one) != len(other):
        return f"{len(one)} and {len(other)} prompts"
    place = next(index for index, prompts in enumerate(zip(one, other, strict=True)) if len(set(prompts)) > 1)
    return f"different prompts: number {place + 1} is {printable(repr(one[place]))} and {printable(repr(other[place]))}"

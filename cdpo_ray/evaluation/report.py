"""Run folder -> one self-contained HTML page."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
import pyarrow as pa
from markupsafe import Markup
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.config import ranking_weights
from cdpo_ray.curriculum.explanation import Gap, ShownStage
from cdpo_ray.errors import StoreError, printable
from cdpo_ray.evaluation import figures
from cdpo_ray.pages.page import (
    NO_INTERVAL,
    format_number,
    formatted_difference,
    formatted_share,
    has_interval,
    inline_png,
    reasons_without_interval,
    relative_change,
    significant_change,
    write_page,
)
from cdpo_ray.pages.previews import preview_rows
from cdpo_ray.records import (
    ARMS,
    CATEGORY,
    EVALUATION,
    IMPLICIT_VALUE,
    PEOPLE,
    PREFERENCE,
    SAMPLES,
    SCORES,
    STAGES,
    TRAINING,
    score_column,
)
from cdpo_ray.store import CONFIG, RunFolder, read_untrusted, tables, validate_untrusted
from cdpo_ray.store.untrusted import Count, Seconds, other_keys_allowed, read_untrusted_bytes

STEPS = (SAMPLES, SCORES, STAGES, TRAINING, EVALUATION)
DIVERSITY, APPEARANCE = "diversity", "appearance"
TRAINED_ON, SCORED, HELD_OUT, UNKNOWN = "trained on", "scored, did not rank", "held out", "reward unknown"
"""Roles of judges, in the order of the tables."""
MAX_IMAGES = 6  # per prompt and model; more would be too small to compare
MAX_CATEGORIES = 40  # shown; more would make the page long
LARGE_CHANGE = 0.05
"""A change of appearance is a sign of hacking if its whole interval exceeds this share of the base's mean.

Measured on the quickstart: trained on `clip`, with a gain that the held-out `oracle` confirms, no interval of
saturation, edge density or JPEG size reached 3 %; trained on `jpeg_size`, while `oracle` fell, edge density rose by
9 to 16 %.
"""


MAX_ROWS = 10_000_000  # of a comparison: run-length encoding fits a billion rows into a small file
RUN_AGAIN = "run `cdpo run CONFIG` to regenerate it"
KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "integers": pa.types.is_integer,
    "text": pa.types.is_string,
    "bytes": pa.types.is_binary,
    "numbers": pa.types.is_floating,
    "booleans": pa.types.is_boolean,
    "lists": lambda kind: pa.types.is_list(kind) and pa.types.is_binary(kind.value_type),
}
"""Kinds of columns, see `check_columns`."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
JudgeName = Annotated[str, Field(pattern=r"^[\w.:]{1,200}$")]


class _Interval(TypedDict):
    mean: Finite
    low: Finite
    high: Finite
    num_prompts: NotRequired[Count]


class _NoInterval(TypedDict):
    mean: Finite
    no_interval: Annotated[str, Field(max_length=1000)]
    num_prompts: NotRequired[Count]


_Estimate = _Interval | _NoInterval


class _Comparison(TypedDict):
    """`statistics.Comparison` as plain values."""

    base: _Estimate
    tuned: _Estimate
    difference: _Estimate
    win_rate: _Estimate
    num_missing: Count


class _Agreement(TypedDict):
    judges: Annotated[list[str], Field(min_length=2, max_length=2)]
    base: Finite | None
    tuned: Finite | None


class _Category(TypedDict):
    category: str
    num_prompts: Count
    judges: dict[JudgeName, _Comparison | None]


@other_keys_allowed
class EvaluationMetrics(TypedDict):
    """Keys of `metrics.json` that comparing runs needs."""

    images_per_prompt: Annotated[int, Field(ge=1, le=1_000_000)]
    diversity: NotRequired[_Comparison]
    appearance: NotRequired[dict[str, _Comparison]]


@other_keys_allowed
class _JudgedEvaluation(EvaluationMetrics):
    """Keys of `metrics.json` that the page shows."""

    num_prompts: Count
    judges: Annotated[dict[JudgeName, _Comparison], Field(min_length=1)]
    agreement: NotRequired[list[_Agreement]]
    preference_accuracy: NotRequired[dict[str, _Estimate | None]]
    labels: NotRequired[dict[str, _Estimate | None]]
    categories: NotRequired[list[_Category]]


@other_keys_allowed
class _Update(TypedDict):
    """Keys of an update that the page shows."""

    stage: Gap
    loss: float
    margin: float
    implicit_accuracy: float
    policy_error_w: float
    policy_error_l: float
    reference_error_w: float
    reference_error_l: float


@other_keys_allowed
class UpdateRecord(_Update):
    """Keys of an update's record that pages show."""

    update: Count
    grad_norm: NotRequired[float]
    update_norm: NotRequired[float]
    learning_rate: NotRequired[float]


@other_keys_allowed
class _TrainedStage(_Update):
    """Keys of a trained stage that the page shows."""

    num_updates: Count
    num_pairs: Count
    seconds: Seconds
    pairs: NotRequired[ShownStage]
    is_stopped: NotRequired[bool]


METRICS: TypeAdapter[EvaluationMetrics] = TypeAdapter(EvaluationMetrics)
_JUDGED_METRICS: TypeAdapter[_JudgedEvaluation] = TypeAdapter(_JudgedEvaluation)
_PLANNED_STAGES = TypeAdapter(Annotated[list[ShownStage], Field(min_length=1, max_length=1000)])
TRAINED_STAGES = TypeAdapter(Annotated[list[_TrainedStage], Field(min_length=1, max_length=1000)])
_UPDATE: TypeAdapter[UpdateRecord] = TypeAdapter(UpdateRecord)


@dataclass(frozen=True)
class MeasureResult:
    """Base against fine-tuned model by one judge or one measure of appearance.

    Attributes:
        name: name of the judge, `diversity`, or name of a measure of appearance.
        role: `trained on`: ranked the pairs; `scored, did not rank`: scored the training images without ranking them;
            `held out`: not used in training; `reward unknown`: may be any of these; `appearance`: not a judge, neither
            direction is better.
        change: -1, 0 or 1: lower, no significant change, higher; significant if the 95 % interval excludes 0. `None`:
            there is no interval.
        values: base, tuned, difference, interval (of the difference), win_rate and win_rate_interval, as text.
        num_missing: number of images without two finite values.
        relative: the difference as a share of the base's mean, an estimate; `None`: a judge, or a mean of 0 or less.
    """

    name: str
    role: str
    change: int | None
    values: Mapping[str, str]
    num_missing: int
    relative: Mapping[str, Any] | None = None

    @property
    def verdict(self) -> str:
        lower, higher = ("fell", "rose") if self.role == APPEARANCE else ("got worse", "improved")
        by = f" by {abs(100 * self.relative['mean']):.1f} %" if self.change and self.relative else ""
        return {-1: lower, 0: "no significant change", 1: higher, None: "no verdict"}[self.change] + by

    @property
    def per_cent(self) -> dict[str, str]:
        """The relative change and its interval in per cent, as text."""
        if self.relative is None:
            return {"mean": "–", "interval": "–"}
        mean = f"{format_number(100 * self.relative['mean'], 1, '+')} %"
        if not has_interval(self.relative):
            return {"mean": mean, "interval": NO_INTERVAL}
        low, high = (format_number(100 * self.relative[end], 1, "+") for end in ("low", "high"))
        return {"mean": mean, "interval": f"[{low}, {high}] %"}

    @property
    def large(self) -> bool:
        """Whether the whole interval of the relative change exceeds `LARGE_CHANGE`."""
        if self.relative is None or not has_interval(self.relative):
            return False
        return max(self.relative["low"], -self.relative["high"]) > LARGE_CHANGE

    @property
    def sentence(self) -> str:
        values = self.values
        wins = f", win rate {values['win_rate']}" if self.role != APPEARANCE else ""
        return (
            f"{self.name} {values['base']} → {values['tuned']}, {values['difference']} {values['interval']}{wins}:"
            f" {self.verdict}"
        )


def write_report(run_dir: Path, output_path: Path, *, people: Mapping[str, Any] | None = None) -> None:
    """Write the page of a finished run atomically; it needs no other file and no network.

    Args:
        run_dir: run folder, `runs/<name>`, with its configuration and all five steps.
        output_path: path of the HTML file; replaced if it exists.
        people: see `people.measure_people`; `None`: nobody has rated the images.

    Raises:
        StoreError: a file of the run is missing or differs from its manifest, or `config.yaml` was edited.
    """
    run = RunFolder(run_dir)
    for step in STEPS:  # samples and scores are not shown and may be very large
        run.refuse_damage(step, read_up_to=0 if step in (SAMPLES, SCORES) else math.inf)
    manifests = {step: run.manifest(step) for step in STEPS}
    config = read_config(run)
    metrics = read_metrics(run_dir)
    voted = {PEOPLE: people["comparison"]} if people else {}
    results = measure_results(metrics | {"judges": metrics["judges"] | voted}, config["rewards"])
    judged = [result for result in results if result.role != APPEARANCE]
    judges = [result.name for result in judged if result.name not in voted]
    comparison_path = run_dir / EVALUATION / "comparison.parquet"
    check_comparison(comparison_path, judges)
    health = manifests[TRAINING]["details"].get("health", {})
    charts = _charts(run_dir, comparison_path, metrics, judges, max_error_rise=health.get("max_error_rise"))
    write_page(
        output_path,
        Path(__file__).with_name("report.html.jinja"),
        name=run_dir.resolve().name,
        created=manifests[EVALUATION]["created"],
        metrics=metrics,
        judged=judged,
        people=people and votes_as_text(people),
        appearance=[result for result in results if result.role == APPEARANCE],
        no_interval=reasons_without_interval([{**metrics, "categories": []}, people]),
        categories=category_rows(metrics.get("categories", []), judges),
        num_categories=len(metrics.get("categories", [])),
        hacking=signs_of_reward_hacking(results),
        trained_on=trained_on(config),
        agreement=agreement_matrix(metrics.get("agreement", []), judges),
        accuracy=[_accuracy(metrics, result.name) for result in judged],
        label_accuracy={name: formatted_share(found) for name, found in metrics.get("labels", {}).items() if found},
        grid=image_grid(comparison_path, judges, config.get("evaluation", {}).get("grid_prompts", 0)),
        previews=preview_rows(run_dir / TRAINING),
        shown_images=min(MAX_IMAGES, metrics["images_per_prompt"]),
        charts={name: Markup(svg) for name, svg in charts.items()},
        health=health,
        pair_stages=_pair_stages(run_dir),
        trained_stages=read_record(run_dir / TRAINING / "stages.json", TRAINED_STAGES),
        manifests=manifests,
        total_seconds=sum(manifest["seconds"] for manifest in manifests.values()),
        versions=_merged(manifests.values(), "versions"),
        machine=_merged(manifests.values(), "machine"),
        config=read_untrusted_bytes(run_dir / CONFIG, remedy=RUN_AGAIN).decode("utf-8", "replace"),
    )


def trained_on(config: Mapping[str, Any]) -> str:
    """What chose between the images of a pair: the ranking reward, or people, whose pairs the reward only sorts."""
    ranking: str = config["rewards"]["rank_by"] or config["rewards"]["names"][0]
    if config.get("preferences"):
        return "people's labels" if ranking == PREFERENCE else f"people's labels, sorted by {ranking}"
    return ranking


def measure_results(metrics: Mapping[str, Any], rewards: Mapping[str, Any] | None) -> list[MeasureResult]:
    """Metrics -> one result per judge, those trained on first, then diversity and the measures of appearance.

    Args:
        metrics: content of `metrics.json`.
        rewards: `names`, `rank_by` and `weights` of the configuration; `None`: unknown.
    """
    roles = dict.fromkeys(rewards["names"], SCORED) if rewards else {}
    roles |= dict.fromkeys(ranking_weights(rewards), TRAINED_ON) if rewards else {}
    order, otherwise = [TRAINED_ON, SCORED, HELD_OUT, UNKNOWN], HELD_OUT if rewards else UNKNOWN
    judged = [_result(name, roles.get(name, otherwise), judge) for name, judge in metrics["judges"].items()]
    judged.sort(key=lambda result: order.index(result.role))
    diversity = {DIVERSITY: metrics[DIVERSITY]} if DIVERSITY in metrics else {}
    appearance = diversity | metrics.get(APPEARANCE, {})
    return judged + [_result(name, APPEARANCE, comparison) for name, comparison in appearance.items()]


def signs_of_reward_hacking(results: Sequence[MeasureResult]) -> list[MeasureResult]:
    """Results that indicate reward hacking: undesired changes while the reward that was trained on rose.

    Signs are a significant fall of another judge or of diversity, and a large change of appearance in either direction:
    see `LARGE_CHANGE`. A better model also varies less, so lower diversity alone is not a sign if a held-out judge
    rose. If the reward is unknown, any judge that rose may be it, and a second one that rose counts as held out.
    """
    rose = [result.role for result in results if result.change == 1]
    if TRAINED_ON not in rose and UNKNOWN not in rose:
        return []
    signs = [result for result in results if result.role != TRAINED_ON and result.change and _is_sign(result)]
    confirmed = HELD_OUT in rose or rose.count(UNKNOWN) > 1
    return [] if [result.name for result in signs] == [DIVERSITY] and confirmed else signs


def agreement_matrix(
    agreement: Sequence[Mapping[str, Any]], judges: Sequence[str]
) -> list[list[dict[str, str] | None]]:
    """``[judge][judge]`` rank correlation on the images of `base` and `tuned`, as text; `None` if not measured.

    Args:
        agreement: `agreement` of `metrics.json`.
        judges: names in the order of rows and columns.
    """
    found = {
        frozenset(entry["judges"]): {arm: "–" if entry[arm] is None else format_number(entry[arm], 2) for arm in ARMS}
        for entry in agreement
    }
    return [[found.get(frozenset([row, column])) for column in judges] for row in judges]


def category_rows(categories: Sequence[Mapping[str, Any]], judges: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a table by category, at most the `MAX_CATEGORIES` largest, with one cell per judge as text.

    Args:
        categories: `categories` of `metrics.json`.
        judges: names in the order of the cells.
    """

    def cell(comparison: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if comparison is None:
            return None
        win_rate, _ = formatted_share(comparison["win_rate"])
        change = significant_change(comparison)
        return formatted_difference(comparison) | {"win_rate": win_rate, "change": change}

    return [
        {"category": found["category"], "num_prompts": found["num_prompts"]}
        | {"cells": [cell(found["judges"].get(judge)) for judge in judges]}
        for found in largest_categories(categories)
    ]


def largest_categories(categories: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The `MAX_CATEGORIES` categories with most prompts, in their order."""
    by_size = sorted(range(len(categories)), key=lambda place: -categories[place]["num_prompts"])
    return [categories[place] for place in sorted(by_size[:MAX_CATEGORIES])]


def image_grid(comparison_path: Path, judges: Sequence[str], num_prompts: int) -> list[dict[str, Any]]:
    """The first held-out prompts: text, and the images of `base` and `tuned` as data URIs with their scores."""
    grid: dict[int, dict[str, Any]] = {}
    for row in first_rows(
        comparison_path, [f"{arm}_{score_column(judge)}" for arm in ARMS for judge in judges], num_prompts
    ):
        shown = grid.setdefault(row["prompt_index"], {"prompt": row["prompt"], "base": [], "tuned": []})
        for arm in ARMS:
            scores = [f"{judge} {_score(row[f'{arm}_{score_column(judge)}'])}" for judge in judges]
            where = place_of(comparison_path, row)
            shown[arm].append(inline_png(row[f"{arm}_image"], where) | {"scores": ", ".join(scores)})
    return list(grid.values())


def first_rows(comparison_path: Path, columns: Sequence[str], num_prompts: int) -> list[dict[str, Any]]:
    """Rows of the first held-out prompts in prompt and sample order, at most `MAX_IMAGES` per prompt.

    Args:
        columns: names of columns besides the indices, the prompt and both images.
    """
    first = sorted(set(read_table(comparison_path, ["prompt_index"])["prompt_index"].to_pylist()))[:num_prompts]
    if not first:
        return []
    columns = ["prompt_index", "prompt", "sample_index", *(f"{arm}_image" for arm in ARMS), *columns]
    shown_rows = [("prompt_index", "in", first), ("sample_index", "<", MAX_IMAGES)]
    return in_order(read_table(comparison_path, columns, shown_rows)).to_pylist()


def in_order(rows: pa.Table) -> pa.Table:
    """Rows sorted by prompt and sample."""
    return rows.sort_by([("prompt_index", "ascending"), ("sample_index", "ascending")])


def place_of(comparison_path: Path, row: Mapping[str, Any]) -> str:
    """File and place of the images of a row, for messages."""
    return f"{comparison_path}: image {row['sample_index']} of prompt {row['prompt_index']}"


def differences_by_prompt(comparison_path: Path, judges: Sequence[str]) -> dict[str, NDArray[np.floating]]:
    """By judge, ``[prompt]`` mean of tuned minus base, without the prompts that lack two finite scores."""
    columns = [f"{arm}_{score_column(judge)}" for arm in ARMS for judge in judges]
    rows = read_table(comparison_path, ["prompt_index", *columns])
    _, prompt = np.unique(rows["prompt_index"].to_numpy(), return_inverse=True)
    found: dict[str, NDArray[np.floating]] = {}
    for judge in judges:
        base, tuned = (np.array(rows[f"{arm}_{score_column(judge)}"].to_pylist(), dtype=float) for arm in ARMS)
        valid = np.isfinite(base) & np.isfinite(tuned)
        total, count = np.bincount(prompt[valid], (tuned - base)[valid]), np.bincount(prompt[valid])
        found[judge] = total[count > 0] / count[count > 0]
    return found


def _pair_stages(run_dir: Path) -> list[dict[str, Any]]:
    """Pairs of each trained stage: as drawn before training, or as redrawn in training by the policy's margins."""
    planned = read_record(run_dir / STAGES / "stages.json", _PLANNED_STAGES)
    trained = read_record(run_dir / TRAINING / "stages.json", TRAINED_STAGES)
    if len(planned) != len(trained) and not (len(planned) > len(trained) and trained[-1].get("is_stopped")):
        raise _damaged(run_dir / TRAINING / "stages.json", f"must have {len(planned)} stages, got {len(trained)}")
    return [stage.get("pairs", plan) for stage, plan in zip(trained, planned, strict=False)]


def _charts(
    run_dir: Path,
    comparison_path: Path,
    metrics: Mapping[str, Any],
    judges: Sequence[str],
    *,
    max_error_rise: float | None,
) -> dict[str, str]:
    updates = read_updates(run_dir / TRAINING / "updates.jsonl")
    categories = largest_categories(metrics.get("categories", []))
    reference_error = float(np.mean([update["reference_error_w"] for update in updates]))
    return figures.training_curves(updates, alarm=max_error_rise and max_error_rise * reference_error) | {
        "pairs": figures.pairs_by_rank_gap(_pair_stages(run_dir)),
        "gains": figures.gains({judge: metrics["judges"][judge] for judge in judges}),
        "differences": figures.difference_histograms(differences_by_prompt(comparison_path, judges)),
        **{f"category {judge}": figures.differences_by_category(categories, judge) for judge in judges if categories},
    }


def _result(name: str, role: str, comparison: Mapping[str, Any]) -> MeasureResult:
    judged = role != APPEARANCE
    wins, wins_interval = formatted_share(comparison["win_rate"]) if judged else ("–", "–")
    relative = None if judged else relative_change(comparison)
    return MeasureResult(
        name=name,
        role=role,
        change=significant_change(comparison),
        values=formatted_difference(comparison) | {"win_rate": wins, "win_rate_interval": wins_interval},
        num_missing=comparison["num_missing"],
        relative=relative,
    )


def votes_as_text(people: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `people.measure_people` with its shares as text."""

    def share(estimate: Mapping[str, Any] | None) -> str:
        return " ".join(formatted_share(estimate)) if estimate else "–"

    return dict(people) | {
        "win_rate": share(people["comparison"]["win_rate"]),
        "left": share(people["left"]),
        "between_voters": share(people["between_voters"]),
        "agreement": {judge: share(estimate) for judge, estimate in people["agreement"].items()},
        "voters": {
            voter: found | {name: share(found[name]) for name in ("win_rate", "left", "agreement")}
            for voter, found in people["voters"].items()
        },
    }


def _accuracy(metrics: Mapping[str, Any], judge: str) -> tuple[str, str] | None:
    found = metrics.get("preference_accuracy", {}).get(judge)
    return formatted_share(found) if found else None


def _is_sign(result: MeasureResult) -> bool:
    if result.role == APPEARANCE and result.name != DIVERSITY:
        return result.large
    return result.change == -1


def _score(value: float | None) -> str:
    return "no score" if value is None or not math.isfinite(value) else f"{value:.4g}".replace("-", "−")


def _merged(manifests: Any, key: str) -> dict[str, str]:
    """Versions or machine of the steps; several values if the steps differ."""
    values: dict[str, list[str]] = {}
    for manifest in manifests:
        for name, value in manifest[key].items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    return {name: ", ".join(found) for name, found in values.items()}


def read_config(run: RunFolder) -> dict[str, Any]:
    """The configuration of a run, as plain values; raises as `RunFolder.config`, and StoreError if it is missing."""
    try:
        return run.config()
    except FileNotFoundError:
        raise _missing(run.path / CONFIG) from None


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """Content of `metrics.json` of a run; raises StoreError with what to do if it is missing or damaged."""
    metrics: dict[str, Any] = read_record(run_dir / EVALUATION / "metrics.json", _JUDGED_METRICS)
    return metrics


def read_record(path: Path, kind: TypeAdapter[Any]) -> Any:
    """Content of a JSON file of a step; raises StoreError with what to do if it is missing or damaged."""
    try:
        return read_untrusted(path, kind, remedy=f"delete {path.parent} and {RUN_AGAIN}")
    except FileNotFoundError:
        raise _missing(path) from None


def read_updates(path: Path) -> list[dict[str, Any]]:
    """Records of `updates.jsonl`, one per update; raises StoreError with what to do if it is missing or damaged."""
    try:
        lines = read_untrusted_bytes(path, remedy=RUN_AGAIN).splitlines()
    except FileNotFoundError:
        raise _missing(path) from None
    if not lines:
        raise _damaged(path, "is empty")
    return [
        validate_untrusted(line, _UPDATE, where=f"{path}:{number}", remedy=f"delete {path.parent} and {RUN_AGAIN}")
        for number, line in enumerate(lines, start=1)
    ]


def read_table(path: Path, columns: Sequence[str], filters: Any = None) -> pa.Table:
    """Columns of a Parquet file; raises StoreError with what to do if it is missing or damaged."""
    try:
        return tables.read_table(path, list(columns), filters)
    except FileNotFoundError:
        raise _missing(path) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None


def check_comparison(path: Path, judges: Sequence[str]) -> None:
    """Refuse a `comparison.parquet` that lacks a column of its schema in `records`, or has one of another type.

    Args:
        judges: judges whose scores are required.

    Raises:
        StoreError: the file is missing or damaged, or a column is wrong; names the first one.
    """
    schema = checked_schema(path)
    images = [f"{arm}_image" for arm in ARMS]
    scores = [f"{arm}_{score_column(judge)}" for arm in ARMS for judge in judges]
    check_columns(
        path,
        schema,
        integers=("prompt_index", "sample_index"),
        text=("prompt", *({CATEGORY} & {*schema.names})),
        bytes=images,
        numbers=(*scores, *({IMPLICIT_VALUE} & {*schema.names})),
    )
    places = read_table(path, ["prompt_index", "sample_index", "prompt"])
    if not places.num_rows or any(column.null_count for column in places.columns):
        raise _damaged(path, "is empty, or has rows without prompt or index")


def checked_schema(path: Path) -> pa.Schema:
    """Schema of a Parquet file of at most `MAX_ROWS` rows.

    Raises:
        StoreError: the file is missing or damaged, or has more rows.
    """
    try:
        schema, num_rows = tables.table_schema(path), tables.num_rows_of(path)
    except FileNotFoundError:
        raise _missing(path) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(path, error) from None
    if num_rows > MAX_ROWS:
        raise _damaged(path, f"must have at most {MAX_ROWS:,} rows, got {num_rows:,}")
    return schema


def check_columns(path: Path, schema: pa.Schema, **required: Sequence[str]) -> None:
    """Check columns of a table.

    Args:
        required: names of required columns by their kind, a key of `KINDS`.

    Raises:
        StoreError: a column is missing or of another kind; names the first one.
    """
    for kind, columns in required.items():
        for name in columns:
            if schema.names.count(name) != 1 or not KINDS[kind](schema.field(name).type):
                raise _damaged(path, f"must have one column `{name}` of {kind}")


def _missing(path: Path) -> StoreError:
    first = "" if path.name == CONFIG else f"delete {path.parent} and "  # every run writes the configuration
    return StoreError(f"{path}: is missing, but the report needs it; {first}{RUN_AGAIN}")


def _damaged(path: Path, error: object) -> StoreError:
    return StoreError(f"{path}: is damaged ({printable(error)}); delete {path.parent} and {RUN_AGAIN}")

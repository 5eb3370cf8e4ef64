"""Images and scores of the candidates of `cdpo judge` -> one comparison: `judge.json` and `judge.html`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdpo_ray.errors import EvaluationError
from cdpo_ray.evaluation.appearance import APPEARANCE
from cdpo_ray.evaluation.joining import row_per_image, with_categories
from cdpo_ray.evaluation.metrics import measure
from cdpo_ray.evaluation.report import DIVERSITY
from cdpo_ray.evaluation.runs import EvaluatedRun, measure_runs, write_comparison
from cdpo_ray.records import ARMS, JUDGED, SAMPLES, SCORES, score_column, score_file
from cdpo_ray.rewards.score_table import read_scores
from cdpo_ray.store import RunFolder, read_shards, read_table

PROMPT_COLUMNS = ("prompt_index", "prompt_id", "prompt")


@dataclass(frozen=True)
class Tried:
    """A candidate whose images are scored.

    Attributes:
        folder: has `1-samples` and `2-scores`.
        trained_on, rewards: see `EvaluatedRun`.
        is_paired: see `EvaluatedRun`.
    """

    name: str
    folder: RunFolder
    trained_on: str = ""
    rewards: Mapping[str, Any] | None = None
    is_paired: bool = True

    def rows(self, judges: Sequence[str]) -> pa.Table:
        """One row per prompt, in prompt order, with lists of scores and of appearance; without images."""
        rows = read_shards(self.folder.step(SAMPLES), [*PROMPT_COLUMNS, *APPEARANCE, DIVERSITY])
        rows = rows.sort_by("prompt_index")
        for judge in judges:
            index, scores = read_scores(self.folder.step(SCORES) / score_file(judge), judge)
            assert index.tolist() == rows["prompt_index"].to_pylist(), "a step's manifest names its input"
            rows = rows.append_column(score_column(judge), pa.array(list(scores)))
        return rows


@dataclass(frozen=True, kw_only=True)
class _TriedBeside(EvaluatedRun):
    """A candidate beside the reference, as a run's evaluation: the reference is its base model."""

    folders: Mapping[str, Path]

    def images(self, arm: str, prompts: Sequence[int], num_images: int) -> Iterator[tuple[int, bytes, str]]:
        for shard in sorted(self.folders[arm].glob("*.parquet")):
            rows = read_table(shard, ["prompt_index", "images"], [("prompt_index", "in", list(prompts))])
            for row in rows.to_pylist():
                for number, png in enumerate(row["images"][:num_images]):
                    yield row["prompt_index"], png, f"{shard}: image {number} of prompt {row['prompt_index']}"


def compare_candidates(
    candidates: Sequence[Tried],
    reference: str,
    output_dir: Path,
    *,
    judges: Sequence[str],
    categories: Mapping[str, str],
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Compare candidates on the held-out prompts of which all have images.

    Args:
        reference: name of the candidate that the others are compared with.
        output_dir: folder of `judge.json` and `judge.html`.
        categories: by prompt, of those that have one.
        num_resamples, seed: number of draws and seed of the bootstrap over prompts.

    Returns:
        Content of `judge.json`: as `runs.measure_runs`, and ``num_left_out``, the number of prompts that some
        candidates have no images of.

    Raises:
        EvaluationError: candidates have no prompt in common, or a judge has no finite score.
    """
    rows = {candidate.name: candidate.rows(judges) for candidate in candidates}
    places = [table["prompt_index"].to_numpy() for table in rows.values()]
    common = reduce(np.intersect1d, places)
    if not len(common):
        raise EvaluationError("judge: no prompt has images of every candidate; see set_aside.jsonl of their 1-samples")
    rows = {name: table.filter(pc.is_in(table["prompt_index"], pa.array(common))) for name, table in rows.items()}
    by_name = {candidate.name: candidate for candidate in candidates}
    base = by_name.pop(reference)
    settings = {"run.seed": seed, "evaluation.num_bootstrap_resamples": num_resamples}
    beside = []
    try:
        for name, candidate in by_name.items():
            both = with_categories(_side_by_side(rows[reference], rows[name]), categories)
            num_images = len(both[f"base_{next(iter(APPEARANCE))}"][0])
            metrics = measure(both, [], num_resamples=num_resamples, seed=seed) | {"images_per_prompt": num_images}
            beside.append(
                _TriedBeside(
                    name=name,
                    path=candidate.folder.path,
                    trained_on=candidate.trained_on,
                    rewards=candidate.rewards,
                    settings=settings,
                    judges={},
                    metrics=metrics,
                    rows=row_per_image(both),
                    is_paired=candidate.is_paired,
                    folders={arm: each.folder.step(SAMPLES) for arm, each in zip(ARMS, (base, candidate), strict=True)},
                )
            )
        found = measure_runs(beside, judges, reference, reference_is_paired=base.is_paired)
    except ValueError as error:  # a judge without finite scores
        raise EvaluationError(f"judge: {error}") from None
    found |= {"num_left_out": len(reduce(np.union1d, places)) - len(common), "left_out": {}}
    found["scored_now"] = {name: [] for name in by_name}
    write_comparison(found, beside, output_dir, JUDGED.removesuffix(".json"), kind="candidate")
    return found


def _side_by_side(base: pa.Table, tuned: pa.Table) -> pa.Table:
    """Rows of the same prompts -> rows of an evaluation."""
    both = base.select(PROMPT_COLUMNS)
    for arm, rows in zip(ARMS, (base, tuned), strict=True):
        for name in rows.column_names:
            if name not in PROMPT_COLUMNS:
                both = both.append_column(f"{arm}_{name}", rows[name])
    return both

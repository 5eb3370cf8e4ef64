"""Rows of compared images -> content of `metrics.json`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from cdpo_ray.evaluation.appearance import APPEARANCE
from cdpo_ray.evaluation.statistics import (
    Comparison,
    Scores,
    bootstrap_mean,
    compare_by_category,
    compare_scores,
    pair_agreement,
    rank_correlation,
)
from cdpo_ray.records import ARMS, CATEGORY, IMPLICIT_VALUE, score_column


def measure(rows: pa.Table, judges: Sequence[str], *, num_resamples: int, seed: int) -> dict[str, Any]:
    """Metrics of the rows of `Comparer`; see `metrics.json` in `records`.

    Args:
        rows: all rows of the evaluation, one per prompt.
        num_resamples, seed: number of draws and seed of the bootstrap over prompts.

    Raises:
        ValueError: a judge has no image with a finite score of both models.
    """

    def column(name: str) -> Scores:
        return np.array(rows[name].to_pylist(), dtype=float)

    def compared(base: Scores, tuned: Scores) -> dict[str, Any]:
        return compare_scores(base, tuned, num_resamples=num_resamples, seed=seed).to_dict()

    scores = {judge: {arm: column(f"{arm}_{score_column(judge)}") for arm in ARMS} for judge in judges}
    measured: dict[str, Any] = {
        "judges": {judge: compared(**arms) for judge, arms in scores.items()},
        "appearance": {name: compared(*(column(f"{arm}_{name}") for arm in ARMS)) for name in APPEARANCE},
        "agreement": [
            {"judges": [one, other]}
            | {arm: _mean_of_finite(rank_correlation(scores[one][arm], scores[other][arm])) for arm in ARMS}
            for one, other in combinations(judges, 2)
        ],
        "preference_accuracy": {},
    }
    diversity = {arm: column(f"{arm}_diversity")[:, None] for arm in ARMS}
    if np.isfinite(diversity["base"]).all():
        measured["diversity"] = compared(**diversity)
    if IMPLICIT_VALUE in rows.column_names:
        values = column(IMPLICIT_VALUE)
        measured["preference_accuracy"] = {
            judge: preference_accuracy(values, arms["base"], num_resamples=num_resamples, seed=seed)
            for judge, arms in scores.items()
        }
    if CATEGORY in rows.column_names:
        measured["categories"] = by_category(scores, rows[CATEGORY].to_pylist(), num_resamples=num_resamples, seed=seed)
    return measured


def by_category(
    scores: Mapping[str, Mapping[str, Scores]], categories: Sequence[str | None], *, num_resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Comparison by each judge on the prompts of each category, in order of first appearance; see `metrics.json`.

    Args:
        scores: by judge, ``[prompt, image]`` scores of `base` and of `tuned`.
        categories: ``[prompt]``; ``None``: the prompt has no category.
        num_resamples, seed: number of draws and seed of the bootstrap over prompts.
    """
    found = {
        judge: compare_by_category(arms["base"], arms["tuned"], categories, num_resamples=num_resamples, seed=seed)
        for judge, arms in scores.items()
    }

    def plain(comparison: Comparison | None) -> dict[str, Any] | None:
        return comparison.to_dict() if comparison else None

    return [
        {"category": category, "num_prompts": number}
        | {"judges": {judge: plain(comparisons[category]) for judge, comparisons in found.items()}}
        for category, number in Counter(each for each in categories if each is not None).items()
    ]


def preference_accuracy(
    values: Scores, scores: Scores, *, prompt_numbers: np.ndarray | None = None, num_resamples: int, seed: int
) -> dict[str, Any] | None:
    """Mean of `pair_agreement` over prompts with its interval; `None` if no prompt has a pair with unequal scores.

    Args:
        values: ``[row, image]`` implicit values.
        scores: ``[row, image]`` scores of a judge.
        prompt_numbers: ``[row]`` integers, equal for rows of the same prompt, which are averaged first; ``None``: each
            row is another prompt.
        num_resamples, seed: number of draws and seed of the bootstrap over prompts.
    """
    agreement = pair_agreement(values, scores)
    finite = np.isfinite(agreement)
    kept = agreement[finite]
    if not len(kept):
        return None
    if prompt_numbers is not None:
        _, prompt = np.unique(prompt_numbers[finite], return_inverse=True)
        kept = np.bincount(prompt, weights=kept) / np.bincount(prompt)
    return asdict(bootstrap_mean(kept, num_resamples=num_resamples, seed=seed)) | {"num_prompts": len(kept)}


def _mean_of_finite(values: Scores) -> float | None:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else None

"""Scores of two models on the same prompts -> means, difference and win rate with confidence intervals."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its confidence interval, in the unit of the values."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Base against fine-tuned model, by one judge.

    Attributes:
        base, tuned: mean score.
        difference: mean of tuned minus base, paired by prompt.
        win_rate: share of images for which the fine-tuned model scores higher; a tie counts one half.
        num_missing: number of images excluded because either score is not finite.
    """

    base: Interval
    tuned: Interval
    difference: Interval
    win_rate: Interval
    num_missing: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def bootstrap_mean(values: Scores, *, num_resamples: int, seed: int, confidence: float = 0.95) -> Interval:
    """Mean over prompts with its percentile bootstrap interval: prompts are resampled with replacement.

    Prompts are resampled, not images, because the images of one prompt are correlated.

    Args:
        values: ``[prompt]``, one number per prompt.
        num_resamples: number of bootstrap draws of the whole set.
        seed: seed of the bootstrap.
        confidence: share of resampled means within the interval.

    Raises:
        ValueError: no values, or a value that is not finite.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1979).
    """
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"bootstrap_mean: `values` must be [prompt], finite and not empty, got {values!r}")
    rng = np.random.default_rng(seed)
    drawn_at_once = max(1, 2**20 // len(values))  # bounds the memory
    means = np.concatenate(
        [
            values[rng.integers(len(values), size=(min(drawn_at_once, num_resamples - start), len(values)))].mean(
                axis=1
            )
            for start in range(0, num_resamples, drawn_at_once)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_over_runs(values: Scores, *, num_resamples: int, seed: int, confidence: float = 0.95) -> Interval:
    """Mean over runs and prompts with its percentile bootstrap interval: both are resampled with replacement.

    The interval covers other seeds and other prompts; `bootstrap_mean` of the mean over runs covers other prompts only.
    The spread over runs is underestimated by a factor of ``sqrt(1 - 1/run)``; a single run has no spread.

    Args:
        values: ``[run, prompt]``, one number per run and prompt; the same prompts in every run.
        num_resamples: number of bootstrap draws of the whole set.
        seed: seed of the bootstrap.
        confidence: share of resampled means within the interval.

    Raises:
        ValueError: no values, or a value that is not finite.

    Source: A. B. Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007).
    """
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"bootstrap_over_runs: `values` must be [run, prompt], finite and not empty, got {values!r}")
    rng = np.random.default_rng(seed)
    num_runs, num_prompts = values.shape
    drawn_at_once = max(1, 2**20 // num_prompts)  # bounds the memory
    means = []
    for start in range(0, num_resamples, drawn_at_once):
        num_drawn = min(drawn_at_once, num_resamples - start)
        times_drawn = rng.multinomial(num_runs, np.full(num_runs, 1 / num_runs), size=num_drawn)
        of_prompts = times_drawn @ values / num_runs
        prompts = rng.integers(num_prompts, size=(num_drawn, num_prompts))
        means.append(np.take_along_axis(of_prompts, prompts, axis=1).mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def compare_scores(base: Scores, tuned: Scores, *, num_resamples: int, seed: int) -> Comparison:
    """Compare the scores of two models on images generated from the same noise.

    Args:
        base, tuned: ``[prompt, image]`` scores, higher is better; each entry of both has the same prompt and noise.
        num_resamples, seed: number of draws and seed of the bootstrap; all intervals draw the same prompts.

    Raises:
        ValueError: the shapes differ, or no image has two finite scores.
    """
    if base.shape != tuned.shape or base.ndim != 2:
        raise ValueError(
            f"compare_scores: `base` and `tuned` must both be [prompt, image], got {base.shape} and {tuned.shape}"
        )
    valid = np.isfinite(base) & np.isfinite(tuned)
    kept = valid.any(axis=1)
    if not kept.any():
        raise ValueError("no image has a finite score of both models; fix the judge")
    wins = np.where(tuned > base, 1.0, np.where(tuned == base, 0.5, 0.0))

    def interval(values: Scores) -> Interval:
        per_prompt = np.where(valid, values, 0).sum(axis=1)[kept] / valid.sum(axis=1)[kept]
        return bootstrap_mean(per_prompt, num_resamples=num_resamples, seed=seed)

    return Comparison(
        interval(base), interval(tuned), interval(tuned - base), interval(wins), num_missing=int((~valid).sum())
    )


def pair_agreement(values: Scores, scores: Scores) -> Scores:
    """Share of a prompt's image pairs that ``values`` order as ``scores`` do; equal values count one half.

    Before training all implicit values are equal, and the share is one half. Pairs with equal scores, or with a value
    or score that is not finite, are excluded.

    Args:
        values, scores: ``[prompt, image]``.

    Returns:
        ``[prompt]``, 0 to 1; NaN if no pair is left.
    """
    value_signs, score_signs = _pair_signs(values, scores)
    num_decided = np.abs(score_signs).sum(axis=1)
    agreeing = (value_signs * score_signs).sum(axis=1)
    return 0.5 + 0.5 * np.divide(agreeing, num_decided, out=np.full(len(values), np.nan), where=num_decided > 0)


def rank_correlation(one: Scores, other: Scores) -> Scores:
    """Kendall's tau-b of two judges within each prompt: -1 (opposite order) to 1 (same order), corrected for ties.

    Args:
        one, other: ``[prompt, image]`` scores; pairs with a score that is not finite are excluded.

    Returns:
        ``[prompt]``; NaN if a judge gives all images the same score.

    Source: M. G. Kendall, "The treatment of ties in ranking problems", Biometrika 33 (1945).
    """
    ones, others = _pair_signs(one, other)
    scale = np.sqrt((ones**2).sum(axis=1) * (others**2).sum(axis=1))
    return np.divide((ones * others).sum(axis=1), scale, out=np.full(len(one), np.nan), where=scale > 0)


def _pair_signs(one: Scores, other: Scores) -> tuple[Scores, Scores]:
    """Order of each image pair by both scores, ``[prompt, pair]`` of -1, 0, 1; 0 if a score is not finite."""
    first, second = np.triu_indices(one.shape[1], k=1)
    valid = np.isfinite(one) & np.isfinite(other)
    kept = valid[:, first] & valid[:, second]
    signs = [
        np.where(kept, np.sign(finite[:, first] - finite[:, second]), 0.0)
        for finite in (np.where(valid, one, 0), np.where(valid, other, 0))
    ]
    return signs[0], signs[1]

"""Scores of several rewards -> one score that ranks the samples of a prompt."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Combine = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""Finite scores of a prompt ``[sample, reward]`` and weights ``[reward]`` -> scores ``[sample]``, higher is better."""


@dataclass(frozen=True)
class RankingRule:
    """Scores that rank the samples of a prompt.

    Attributes:
        rank_by: key of `COMBINATIONS`, or a single reward.
        weights: reward -> weight of the combined rewards; only ``weighted_sum`` uses the values.
        with_noise: whether the rewards scored some prompts twice.
        with_labels: whether people labelled the samples; then only scores that agree with the labels form pairs.

    Source: arXiv:2405.13637 (one reward); the combinations have other sources.
    """

    rank_by: str
    weights: Mapping[str, float]
    with_noise: bool = False
    with_labels: bool = False

    def combine(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Combine the scores of each prompt.

        A sample with a non-finite score gets NaN and is not ranked; it does not affect the others.

        Args:
            scores: ``[prompt, sample, reward]``, rewards in the order of ``weights``, each in its unit, higher is
                better.

        Returns:
            ``[prompt, sample]`` float64, higher is better; in the unit of the reward or the combination.

        Raises:
            ValueError: if ``scores`` has another shape.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.ndim != 3 or scores.shape[2] != len(self.weights):
            raise ValueError(
                f"`scores` must be [prompt, sample, reward] of {', '.join(self.weights)}, got shape {scores.shape}"
            )
        if self.rank_by not in COMBINATIONS:
            return scores[:, :, 0]
        combine, weights = COMBINATIONS[self.rank_by], np.array(list(self.weights.values()))
        finite = np.isfinite(scores).all(axis=2)
        combined = np.full(finite.shape, np.nan)
        for prompt in np.flatnonzero(finite.any(axis=1)):
            combined[prompt, finite[prompt]] = combine(scores[prompt, finite[prompt]], weights)
        return combined


def weighted_sum(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted sum of each reward's z-scores within the prompt, in standard deviations.

    ``sum_r weights[r] * (scores[r] - mean_r) / std_r`` with the population standard deviation over the prompt's
    samples. A reward with equal scores contributes 0; a negative weight prefers low scores.
    """
    lowest, highest = scores.min(axis=0), scores.max(axis=0)
    differ = lowest < highest
    # z-scores do not change by this scaling to 0..1, which prevents overflow of squares
    scaled = (scores - lowest) / np.where(differ, highest - lowest, 1)
    return (scaled - scaled.mean(axis=0)) / np.where(differ, scaled.std(axis=0), 1) @ weights


def mean_rank(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Borda count: minus the mean over rewards of a sample's rank within the prompt, 0 = best.

    Equal scores share their mean rank. All rewards have the same weight.
    """
    one, other = scores[:, None], scores
    num_better, num_equal = (other > one).sum(axis=1), (other == one).sum(axis=1)  # a sample equals itself
    return -(num_better + (num_equal - 1) / 2).mean(axis=1)


def pareto(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pareto dominance: minus the index of a sample's non-dominated front, 0 = best.

    A sample dominates another if no reward scores it lower and at least one scores it higher. Front 0 holds the
    non-dominated samples, front ``k`` those that are non-dominated without the earlier fronts. Scores are equal within
    a front, so it forms no pair, and the rejected sample of a pair never dominates the chosen one. Weights are ignored.

    Source: non-dominated sorting, Deb et al. 2002; arXiv:2502.02588 for preference pairs.
    """
    one, other = scores[:, None], scores
    dominates = np.all(one >= other, axis=2) & np.any(one > other, axis=2)
    front, remaining = np.zeros(len(scores)), np.full(len(scores), True)
    while remaining.any():
        remaining &= dominates[remaining].any(axis=0)
        front += remaining
    return -front


COMBINATIONS: dict[str, Combine] = {"weighted_sum": weighted_sum, "mean_rank": mean_rank, "pareto": pareto}

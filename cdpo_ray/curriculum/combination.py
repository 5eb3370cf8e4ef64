"""Scores of several rewards -> the one score that ranks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Combine = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""One prompt's finite scores ``[sample, reward]``, weights ``[reward]`` -> scores ``[sample]``, higher is better."""


@dataclass(frozen=True)
class RankingRule:
    """By which scores the samples of a prompt are ranked.

    Attributes:
        rank_by: a key of `COMBINATIONS`, or the one reward.
        weights: reward -> its weight, of those that have a say; only ``weighted_sum`` looks at the numbers.
        with_noise: whether the rewards have scored some prompts twice.
        with_labels: whether people judged the samples, so that only what agrees with them forms pairs.

    Source: arXiv:2405.13637 ranks by one reward; the combinations have their own.
    """

    rank_by: str
    weights: Mapping[str, float]
    with_noise: bool = False
    with_labels: bool = False

    def combine(self, scores: ArrayLike) -> NDArray[np.float64]:
        """The scores that rank, prompt by prompt.

        A sample with any score that is not finite gets NaN, which sets it aside; the others are combined as if it were
        not there.

        Args:
            scores: ``[prompt, sample, reward]``, rewards in the order of ``weights``, each in its unit, higher is
                better.

        Returns:
            ``[prompt, sample]`` float64, higher is better: in the reward's unit, or the combination's.

        Raises:
            ValueError: if the last axis is not that of the rewards.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.ndim != 3 or scores.shape[2] != len(self.weights):
            raise ValueError(
                f"`scores` must be [prompt, sample, reward] of {', '.join(self.weights)}, got shape {scores.shape}"
            )
        if self.rank_by not in COMBINATIONS:
            return scores[:, :, 0]
        combine, weights = COMBINATIONS[self.rank_by], np.array(list(self.weights.values()))
        whole = np.isfinite(scores).all(axis=2)
        combined = np.full(whole.shape, np.nan)
        for prompt in np.flatnonzero(whole.any(axis=1)):
            combined[prompt, whole[prompt]] = combine(scores[prompt, whole[prompt]], weights)
        return combined


def weighted_sum(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum of each reward's standard scores within the prompt, times its weight, in standard deviations.

    ``sum_r weights[r] * (scores[r] - mean_r) / std_r`` with the population's standard deviation over the prompt's
    samples. A reward that scores them all alike adds 0; a negative weight asks for low scores.
    """
    lowest, highest = scores.min(axis=0), scores.max(axis=0)
    differ = lowest < highest
    # Standardising undoes this scaling to 0..1, which keeps squares from overflow.
    scaled = (scores - lowest) / np.where(differ, highest - lowest, 1)
    return (scaled - scaled.mean(axis=0)) / np.where(differ, scaled.std(axis=0), 1) @ weights


def mean_rank(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Agreement by Borda's count: minus the mean over rewards of a sample's rank within the prompt, 0 = best.

    Equal scores share the mean of their ranks. Every reward has the same weight.
    """
    one, other = scores[:, None], scores
    num_better, num_equal = (other > one).sum(axis=1), (other == one).sum(axis=1)  # a sample equals itself
    return -(num_better + (num_equal - 1) / 2).mean(axis=1)


def pareto(scores: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Agreement by dominance: minus the index of the non-dominated front that holds a sample, 0 = best.

    A sample dominates another if no reward scores it lower and one scores it higher. Front 0 holds those that none
    dominates, front ``k`` those that none does once the fronts before are taken away. Within a front scores are equal,
    so it forms no pair, and the rejected of a pair never dominates the chosen. Weights do not matter.

    Source: non-dominated sorting, Deb et al. 2002; arXiv:2502.02588 for preference pairs.
    """
    one, other = scores[:, None], scores
    dominates = np.all(one >= other, axis=2) & np.any(one > other, axis=2)
    front, left = np.zeros(len(scores)), np.full(len(scores), True)
    while left.any():
        left &= dominates[left].any(axis=0)
        front += left
    return -front


COMBINATIONS: dict[str, Combine] = {"weighted_sum": weighted_sum, "mean_rank": mean_rank, "pareto": pareto}

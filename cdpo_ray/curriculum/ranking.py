"""Scores -> ranking."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Ranking:
    """Samples of each prompt, best first; rank 0 is the best.

    Attributes:
        order: ``[prompt, sample]`` int32, sample index of each rank; unranked samples come last.
        sorted_scores: ``[prompt, sample]`` float64, scores in that order, descending; NaN for unranked samples.
        num_ranked: ``[prompt]`` int64, number of ranks of each prompt.
    """

    order: NDArray[np.int32]
    sorted_scores: NDArray[np.float64]
    num_ranked: NDArray[np.int64]

    @property
    def num_samples(self) -> int:
        """Number of samples per prompt, ranked or not."""
        return int(self.order.shape[1])

    @property
    def num_unranked(self) -> NDArray[np.int64]:
        """Number of samples without a finite score, ``[prompt]`` int64."""
        return self.num_samples - self.num_ranked


def rank_samples(scores: ArrayLike) -> Ranking:
    """Rank the samples of each prompt by score, highest first.

    Equal scores rank by sample index. A sample whose score is NaN or infinite has no rank and forms no pair.

    Args:
        scores: ``[prompt, sample]``, in the reward's unit, higher is better.

    Raises:
        ValueError: if ``scores`` has another shape, or no sample.

    Source: arXiv:2405.13637.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise ValueError(f"`scores` must be [prompt, sample] with at least one sample, got shape {scores.shape}")
    finite = np.isfinite(scores)
    order = np.argsort(np.where(finite, -scores, np.inf), axis=1, kind="stable").astype(np.int32)
    sorted_scores = np.take_along_axis(np.where(finite, scores, np.nan), order, axis=1)
    return Ranking(order, sorted_scores, np.count_nonzero(finite, axis=1))

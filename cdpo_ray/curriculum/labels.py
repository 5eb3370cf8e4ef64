"""Scores and what people said -> scores that may form pairs: labels win."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def where_labels_agree(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Scores of pairs that people judged; NaN where the scores are not in the order of the labels.

    A pair's difficulty is its score gap only where the scores agree with the label; a pair on which they are equal or
    disagree has no difficulty and is set aside. Nobody's label is ever turned round.

    Args:
        scores: ``[pair, 2]``, in the reward's unit, higher is better.
        labels: ``[pair, 2]``, higher is preferred.

    Returns:
        ``[pair, 2]`` float64.

    Raises:
        ValueError: if either is not a table of pairs.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if scores.shape != labels.shape or scores.ndim != 2 or scores.shape[1] != 2:
        raise ValueError(f"`scores` and `labels` must be [pair, 2], got shapes {scores.shape} and {labels.shape}")
    agree = np.diff(scores) * np.diff(labels) > 0
    return np.where(agree, scores, np.nan)

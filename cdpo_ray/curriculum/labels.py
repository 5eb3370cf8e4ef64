"""Scores and human labels -> scores of pairs on which both agree."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def where_labels_agree(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Scores of labelled pairs; NaN where scores and labels disagree.

    The score gap is the difficulty of a pair only if the scores agree with the label; a pair with equal or disagreeing
    scores is excluded. Labels are never reversed.

    Args:
        scores: ``[pair, 2]``, in the reward's unit, higher is better.
        labels: ``[pair, 2]``, higher is preferred.

    Returns:
        ``[pair, 2]`` float64.

    Raises:
        ValueError: if a shape is not ``[pair, 2]``.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if scores.shape != labels.shape or scores.ndim != 2 or scores.shape[1] != 2:
        raise ValueError(f"`scores` and `labels` must be [pair, 2], got shapes {scores.shape} and {labels.shape}")
    agree = np.diff(scores) * np.diff(labels) > 0
    return np.where(agree, scores, np.nan)

"""Scores and human labels -> scores of images on whose order both agree."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def where_labels_agree(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.float64]:
    """Scores of labelled images; NaN where scores and labels disagree.

    The score gap is the difficulty of a pair only if the scores agree with the labels. Labels are never reversed. Of a
    row, the image with the most disagreements is excluded until none is left, so that every pair of the remaining
    images has the labels' order; a single remaining image is excluded too, because it forms no pair. Of two images
    that disagree, none remains.

    Args:
        scores: ``[row, image]``, in the reward's unit, higher is better; not finite: no score.
        labels: ``[row, image]``, higher is preferred; not finite: no image.

    Returns:
        ``[row, image]`` float64.

    Raises:
        ValueError: if the shapes differ or are not ``[row, image]``.
    """
    scores, labels = _checked(scores, labels)
    remaining = np.where(np.isfinite(labels), scores, np.nan)
    rows = np.arange(len(scores))
    while len(rows):
        counts = num_disagreements(remaining[rows], labels[rows])
        disagree = counts.any(axis=1)
        rows = rows[disagree]
        remaining[rows, counts[disagree].argmax(axis=1)] = np.nan
    alone = np.isfinite(remaining).sum(axis=1) < 2
    remaining[alone] = np.nan
    return remaining


def num_disagreements(scores: ArrayLike, labels: ArrayLike) -> NDArray[np.int64]:
    """Number of other images of its row that scores and labels order differently, ``[row, image]``.

    A tie in one of them and none in the other is a disagreement. Images without a finite score and label have none.

    Args:
        scores, labels: ``[row, image]``, higher is better.
    """
    scores, labels = _checked(scores, labels)
    compared = np.isfinite(scores) & np.isfinite(labels)
    scores, labels = np.where(compared, scores, 0), np.where(compared, labels, 0)
    counts = np.zeros(scores.shape, dtype=np.int64)
    for image in range(scores.shape[1]):
        one = slice(image, image + 1)
        differ = np.sign(scores - scores[:, one]) != np.sign(labels - labels[:, one])
        counts += differ & compared & compared[:, one]
    return counts


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(f"`scores` and `labels` must be [row, image], got shapes {scores.shape} and {labels.shape}")
    return scores, labels

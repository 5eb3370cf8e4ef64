"""First and second scores of the same samples -> noise of the rewards."""

import numpy as np
from numpy.typing import NDArray


def score_noise(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Standard deviation of a score over repeated scorings: ``sqrt(mean((first - second)^2) / 2)``.

    If ``first = s + e`` and ``second = s + e'`` with independent errors of variance ``v``, the expected squared
    difference is ``2 v``.

    Args:
        first, second: of any common shape, in the reward's unit; entries that are not finite in both are ignored.

    Returns:
        In the reward's unit; NaN without entries.
    """
    difference = _difference(first, second)
    known = np.isfinite(difference)
    return float(np.sqrt(np.square(difference[known]).mean() / 2)) if known.any() else float("nan")


def gap_noise(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Standard deviation of the score gap between two samples of a prompt over repeated scorings.

    As in `score_noise`, it is ``sqrt(mean(D^2) / 2)`` of the difference ``D`` between a gap's two scorings, over all
    pairs of a prompt. With ``d = first - second``, ``D_ij = d_i - d_j``, and the sum over the pairs of ``n`` samples is
    ``n sum_i (d_i - mean(d))^2``, so

        ``gap_noise^2 = sum_prompts n sum_i (d_i - mean(d))^2 / sum_prompts n (n - 1)``.

    An error that all images of a prompt share changes no gap and does not count; with independent errors the result is
    ``sqrt(mean(d^2))``, sqrt(2) times `score_noise`. For combined scores, whose errors are dependent and differ between
    pairs, it is the average over pairs.

    Args:
        first, second: ``[prompt, sample]`` scores that rank; entries that are not finite in both are ignored.

    Returns:
        In the unit of the scores; NaN if no prompt has two such samples.
    """
    difference = _difference(first, second)
    known = np.isfinite(difference)
    counts = known.sum(axis=1)
    mean = np.sum(difference, axis=1, where=known) / np.maximum(counts, 1)
    squares = np.sum(np.square(difference - mean[:, None]), axis=1, where=known)
    num_ordered_pairs = (counts * (counts - 1)).sum()
    return float(np.sqrt((counts * squares).sum() / num_ordered_pairs)) if num_ordered_pairs else float("nan")


def _difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.subtract(
        first, second, out=np.full(np.shape(first), np.nan), where=np.isfinite(first) & np.isfinite(second)
    )

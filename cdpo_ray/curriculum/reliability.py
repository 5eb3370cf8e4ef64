"""Margins by draw -> how reliably they order the pairs."""

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.pairs import PairSet

MAX_PAIRS = 2**18
"""Maximum number of pairs that the reliability is measured on; evenly spaced if there are more."""
LOW_RELIABILITY = 0.8
"""Reliability below which a stage's order is a warning. At 0.8, two measurements place 54 % of the pairs in the same of
four levels, at 0.95 74 % (normal margins)."""


def margin_reliability(values: NDArray[np.floating], formed: PairSet) -> float | None:
    """Rank correlation to expect between the order of pairs by margin and by another measurement of the same size.

    Spearman's correlation ``r`` between the margins of two halves of the draws, extrapolated to all draws by the
    Spearman-Brown formula ``k r / (1 + (k - 1) r)``, ``k`` = number of draws / draws per half. It includes every noise
    that is independent between draws: of timesteps, of noises, and of rounding. An ``r`` below 0 counts as 0.

    Args:
        values: ``[draw, prompt, sample]``, implicit rewards in nats, by sample index. Of an odd number of draws the
            last is in neither half.
        formed: pairs to order.

    Returns:
        0 to 1; `None`: fewer than two draws, or a half has equal margins only, as before the first update.

    Source: C. Spearman and W. Brown, British Journal of Psychology 3 (1910).
    """
    num_draws, half = len(values), len(values) // 2
    if not half or not formed.num_pairs:
        return None
    numbers = np.linspace(0, formed.num_pairs - 1, min(formed.num_pairs, MAX_PAIRS)).astype(np.int64)
    pairs = formed.at(numbers)
    means = (values[first : 2 * half : 2].mean(axis=0, dtype=np.float64) for first in (0, 1))
    one, other = (_ranks(mean[pairs.prompt, pairs.chosen] - mean[pairs.prompt, pairs.rejected]) for mean in means)
    if not (np.ptp(one) and np.ptp(other)):
        return None
    correlation = max(0.0, float(np.corrcoef(one, other)[0, 1]))
    return correlation_of_more_draws(correlation, num_draws / half)


def correlation_of_more_draws(correlation: float, factor: float) -> float:
    """Correlation between two measurements with ``factor`` times the draws, by the Spearman-Brown formula."""
    return factor * correlation / (1 + (factor - 1) * correlation)


def low_reliability(stage: int, reliability: float | None, num_draws: int) -> str | None:
    """Warning that a stage's order is not reliable, with a number of draws that would be; `None`: it is, or not known.

    Args:
        stage: number of the stage, from 1.
        reliability: see `margin_reliability`.
        num_draws: number of draws that it was measured with.
    """
    if reliability is None or reliability >= LOW_RELIABILITY:
        return None
    enough = ""
    if reliability:  # the inverse of `correlation_of_more_draws`
        factor = LOW_RELIABILITY * (1 - reliability) / (reliability * (1 - LOW_RELIABILITY))
        enough = f" to about {max(num_draws + 1, round(num_draws * factor)):,}"
    return (
        f"stage {stage}: the reliability of the order by margin is {reliability:.2f}, below {LOW_RELIABILITY:g}, so"
        " another measurement would order many pairs differently; raise `curriculum.num_margin_draws` from"
        f" {num_draws}{enough}"
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each value; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return mean_rank

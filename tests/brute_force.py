"""Brute-force pairs and levels from the definitions, as reference of the tests."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cdpo_ray.curriculum.pairs import PairArrays

# Tenths and their float64 neighbours make differences that depend on rounding; NaN and infinity are not ranked.
SCORE = st.one_of(
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.1 + 0.2, 0.7, 0.8, -0.1, 1e16, np.nan, np.inf, -np.inf]),
    st.floats(-10, 10, width=32),
)
SCORES = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 9)), elements=SCORE)
MIN_SCORE_GAP = st.sampled_from([0.0, 0.1, 0.2, 0.7 - 0.1, 0.5])

Pair = tuple[int, int, int, int, float]
"""Prompt, chosen, rejected, rank gap, score gap."""


def ranked(row: list[float]) -> list[int]:
    """Sample indices of finite score, best first, ties by index."""
    return sorted((i for i in range(len(row)) if np.isfinite(row[i])), key=lambda i: (-row[i], i))


def formed_pairs(scores: np.ndarray, min_score_gap: float = 0.0) -> list[Pair]:
    """Every pair that can be formed, by prompt, chosen rank and rejected rank."""
    pairs = []
    for prompt, row in enumerate(scores.tolist()):
        order = ranked(row)
        for rank_w, w in enumerate(order):
            for rank_l in range(rank_w + 1, len(order)):
                score_gap = row[w] - row[order[rank_l]]
                if score_gap > min_score_gap:
                    pairs.append((prompt, w, order[rank_l], rank_l - rank_w, score_gap))
    return pairs


def level_by_rank_gap(pair: Pair, scores: np.ndarray, num_levels: int) -> int:
    """Level of a pair by the paper's intervals, over the ranks of its prompt."""
    gaps = len(ranked(scores[pair[0]].tolist())) - 1
    (level,) = [
        k
        for k in range(1, num_levels + 1)
        if gaps * (num_levels - k) < pair[3] * num_levels <= gaps * (num_levels - k + 1)
    ]
    return level


def level_by_score_gap(pair: Pair, formed: list[Pair], num_levels: int) -> int:
    """Level of a pair by the released code: the first stage whose threshold its score gap reaches.

    The thresholds are evenly spaced from the smallest score gap to the largest, which is not a threshold itself.
    """
    score_gaps = [other[4] for other in formed]
    thresholds = np.linspace(min(score_gaps), max(score_gaps), num_levels + 1)[:-1]
    return next(k for k in range(1, num_levels + 1) if pair[4] >= thresholds[num_levels - k])


def rows(pairs: PairArrays) -> list[Pair]:
    columns = (pairs.prompt, pairs.chosen, pairs.rejected, pairs.rank_gap, pairs.score_gap)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def chi_square_is_plausible(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the chi-squared statistic of the counts is within 4 standard deviations."""
    freedom = len(counts) - 1
    chi_square = np.sum((counts - expected) ** 2 / expected)
    return bool(abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom))

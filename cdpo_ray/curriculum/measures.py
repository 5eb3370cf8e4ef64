"""Pairs -> levels of difficulty, a measure each; level 1 is the easiest."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.drawing import Accept
from cdpo_ray.curriculum.pairs import AdmittedPairs, ListedPairs, PairBatch, PairSet
from cdpo_ray.curriculum.ranking import Ranking
from cdpo_ray.curriculum.stages import admitted_gaps, smallest_gap
from cdpo_ray.randomness.numbers import unit_interval

Between = Callable[[int, int], PairSet]
"""First and last level, both inclusive -> their pairs."""


@dataclass(frozen=True)
class Cut:
    """How the pairs of a ranking are to be cut.

    Attributes:
        ranking: the samples of each prompt.
        num_levels: >= 1.
        boundaries: ``linear`` in the measure, or ``equal_count``.
        min_score_gap: pairs form above it, in the reward's unit.
        values: ``[prompt, sample]`` float, by sample index; only for ``margin``.
    """

    ranking: Ranking
    num_levels: int
    boundaries: str = "linear"
    min_score_gap: float = 0.0
    values: NDArray[np.floating] | None = None


def levels_by_rank_gap(cut: Cut) -> Between:
    """Levels of whole rank gaps: linear in the gap, on the ranks that each prompt has, or of equal count.

    With linear boundaries and samples set aside a prompt divides the gaps between the ranks it has left: each gap still
    belongs to one level, and some levels may bring nothing of that prompt.

    Raises:
        ValueError: if a complete prompt has fewer rank gaps than levels.

    Source: arXiv:2405.13637 (linear).
    """
    ranking, num_levels = cut.ranking, cut.num_levels
    _, most = admitted_gaps(ranking.num_samples, num_levels, 1, num_levels)
    if cut.boundaries == "linear":
        ranks = np.maximum(ranking.num_ranked, 1).tolist()
        smallest = [
            np.array([smallest_gap(rank, num_levels, level) for rank in ranks]) for level in range(num_levels + 1)
        ]
    else:

        def count_above(gap: int) -> int:
            return AdmittedPairs(ranking, gap + 1, min_score_gap=cut.min_score_gap).num_pairs

        smallest = [np.array(edge + 1) for edge in equal_count_edges(count_above, 0, most, num_levels)]
    return lambda first, last: AdmittedPairs(
        ranking, smallest[last], smallest[first - 1] - 1, min_score_gap=cut.min_score_gap
    )


def levels_by_score_gap(cut: Cut) -> Between:
    """Levels of score gaps: level ``k`` of ``B`` holds those in ``(G(B-k)/B, G(B-k+1)/B]``, or of equal count.

    ``G`` is the largest score gap of any pair of the table, so a prompt may have no pair in a level.

    Source: the released code of arXiv:2405.13637 (linear).
    """
    ranking, num_levels = cut.ranking, cut.num_levels
    largest = AdmittedPairs(ranking, min_score_gap=cut.min_score_gap).extent.max_score_gap
    if cut.boundaries == "linear":
        edges = [largest * ((num_levels - level) / num_levels) for level in range(num_levels + 1)]
    else:

        def count_above(bits: int) -> int:
            return AdmittedPairs(ranking, min_score_gap=_float_of(bits)).num_pairs

        low, high = _bits_of(cut.min_score_gap), _bits_of(largest)
        edges = [
            _float_of(bits) for bits in equal_count_edges(count_above, low, max(high, low + num_levels), num_levels)
        ]
    return lambda first, last: AdmittedPairs(
        ranking, min_score_gap=max(edges[last], cut.min_score_gap), max_score_gap=edges[first - 1]
    )


def levels_by_score_gap_quantile(cut: Cut) -> Between:
    """Levels linear in the quantile of a score gap among all formed pairs, that is, of equal count."""
    return levels_by_score_gap(Cut(cut.ranking, cut.num_levels, "equal_count", cut.min_score_gap))


def levels_by_margin(cut: Cut) -> Between:
    """Levels of equal count by the margin under the policy, ``value(chosen) - value(rejected)``, largest first.

    Equal margins, as all are before the first update, are told apart by the rank gap, then by prompt and rank. Memory
    is O(pairs).

    Raises:
        ValueError: if boundaries are linear, or a ranked sample's value is not finite.
    """
    if cut.boundaries != "equal_count":
        raise ValueError(f"`boundaries` must be 'equal_count' for the margin, got {cut.boundaries!r}")
    ranking, formed = cut.ranking, AdmittedPairs(cut.ranking, min_score_gap=cut.min_score_gap)
    values = np.zeros(ranking.order.shape) if cut.values is None else np.asarray(cut.values, dtype=np.float64)
    if values.shape != ranking.order.shape:
        raise ValueError(f"`values` must be [prompt, sample] {ranking.order.shape}, got shape {values.shape}")
    is_ranked = np.isfinite(ranking.sorted_scores)
    if num_bad := np.count_nonzero(~np.isfinite(np.take_along_axis(values, ranking.order, axis=1)) & is_ranked):
        raise ValueError(f"`values` of {num_bad} ranked samples are not finite; has training diverged?")
    margin, rank_gap = np.empty(formed.num_pairs), np.empty(formed.num_pairs, dtype=np.int32)
    for numbers, pairs in formed.chunks():
        margin[numbers] = values[pairs.prompt, pairs.chosen] - values[pairs.prompt, pairs.rejected]
        rank_gap[numbers] = pairs.rank_gap
    easy_first = np.lexsort((-rank_gap, -margin))

    def between(first: int, last: int) -> PairSet:
        start, end = ((level * formed.num_pairs) // cut.num_levels for level in (first - 1, last))
        return ListedPairs(formed, np.sort(easy_first[start:end]))

    return between


MEASURES: dict[str, Callable[[Cut], Between]] = {
    "rank_gap": levels_by_rank_gap,
    "score_gap": levels_by_score_gap,
    "score_gap_quantile": levels_by_score_gap_quantile,
    "margin": levels_by_margin,
}


def accept_by_rank_gap(admitted: PairSet, formed: PairSet) -> Accept:
    """Keep a pair with probability rank gap / the largest admitted one."""
    return lambda pairs, words: unit_interval(words) * admitted.extent.max_rank_gap < pairs.rank_gap


def accept_by_score_gap(admitted: PairSet, formed: PairSet) -> Accept:
    """Keep a pair with probability score gap / the largest admitted one."""
    return lambda pairs, words: unit_interval(words) * admitted.extent.max_score_gap < pairs.score_gap


def accept_by_score_gap_quantile(admitted: PairSet, formed: PairSet) -> Accept:
    """Keep a pair with the probability of its quantile: if its score gap is at least a randomly drawn formed pair's."""

    def accept(pairs: PairBatch, words: NDArray[np.uint64]) -> NDArray[np.bool_]:
        rivals = formed.at((words % np.uint64(formed.num_pairs)).astype(np.int64))
        return rivals.score_gap <= pairs.score_gap

    return accept


ACCEPTS: dict[str, Callable[[PairSet, PairSet], Accept]] = {
    "rank_gap": accept_by_rank_gap,
    "score_gap": accept_by_score_gap,
    "score_gap_quantile": accept_by_score_gap_quantile,
}
"""For draws in proportion to the measure; a margin may be negative, so it has none."""


def equal_count_edges(count_above: Callable[[int], int], lowest: int, highest: int, num_levels: int) -> list[int]:
    """Edges ``e_0 > e_1 > ..``: level ``k`` holds values in ``(e_k, e_(k-1)]``, as many as in any other level.

    Each edge is the one that brings the count above it nearest to ``k / num_levels`` of all, while it leaves at least
    one value to each other level. Values that are equal stay together.

    Args:
        count_above: how many lie above a value; must not rise with it.
        lowest, highest: ``e_B`` and ``e_0``; all values lie in ``lowest + 1 .. highest``.
        num_levels: 1 to ``highest - lowest``.
    """
    assert 1 <= num_levels <= highest - lowest
    total = count_above(lowest)
    edges = [highest]
    for level in range(1, num_levels):
        low, high = lowest + num_levels - level, edges[-1] - 1
        above_low, above_high = count_above(low), count_above(high)
        while high - low > 1 and above_low - above_high > 1:
            middle = (low + high) // 2
            above = count_above(middle)
            if above * num_levels > total * level:
                low, above_low = middle, above
            else:
                high, above_high = middle, above
        missed_low, missed_high = (abs(above * num_levels - total * level) for above in (above_low, above_high))
        edges.append(low if missed_low < missed_high else high)
    return [*edges, lowest]


def _bits_of(value: float) -> int:
    """Numbers >= 0 as integers in the same order, so that bisection ends after at most 64 steps on any scale."""
    return int(np.float64(abs(value)).view(np.int64))


def _float_of(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))

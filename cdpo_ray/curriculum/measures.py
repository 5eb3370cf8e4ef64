"""Pairs -> levels of difficulty, by one of several measures; level 1 is the easiest."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.drawing import Accept
from cdpo_ray.curriculum.pairs import AdmittedPairs, ListedPairs, PairArrays, PairSet
from cdpo_ray.curriculum.ranking import Ranking
from cdpo_ray.curriculum.stages import admitted_gaps, smallest_gap
from cdpo_ray.errors import CurriculumError
from cdpo_ray.randomness.numbers import unit_interval
from cdpo_ray.user_code import attribute_errors, load_function

PairsOfLevels = Callable[[int, int], PairSet]
"""Pairs of the levels from the first to the last, both inclusive."""


@dataclass(frozen=True)
class Cut:
    """How to divide the pairs of a ranking into levels.

    Attributes:
        ranking: ranking of the samples of each prompt.
        num_levels: number of levels, >= 1.
        boundaries: ``linear`` in the measure, or ``equal_count``.
        min_score_gap: score gap that pairs must exceed, in the reward's unit.
        values: implicit rewards ``[prompt, sample]``, by sample index; only for ``margin``.
        min_rank_gap: smallest rank gap that forms a pair, >= 1.
    """

    ranking: Ranking
    num_levels: int
    boundaries: str = "linear"
    min_score_gap: float = 0.0
    values: NDArray[np.floating] | None = None
    min_rank_gap: int = 1

    @property
    def formed(self) -> AdmittedPairs:
        """All pairs that the levels divide."""
        return AdmittedPairs(self.ranking, self.min_rank_gap, min_score_gap=self.min_score_gap)


def levels_by_rank_gap(cut: Cut) -> PairsOfLevels:
    """Levels by rank gap: linear in the gap, over the ranks of each prompt, or of equal count.

    With linear boundaries, a prompt with unranked samples divides the gaps between its remaining ranks: each gap still
    belongs to one level, and some levels may hold no pair of that prompt.

    Raises:
        ValueError: if there are more levels than rank gaps of a complete prompt.

    Source: arXiv:2405.13637 (linear).
    """
    ranking, num_levels, min_gap = cut.ranking, cut.num_levels, cut.min_rank_gap
    _, most = admitted_gaps(ranking.num_samples, num_levels, 1, num_levels, min_gap=min_gap)
    if cut.boundaries == "linear":
        ranks = np.maximum(ranking.num_ranked, 1).tolist()
        smallest = [
            np.array([smallest_gap(rank, num_levels, level, min_gap=min_gap) for rank in ranks])
            for level in range(num_levels + 1)
        ]
    else:

        def count_above(gap: int) -> int:
            return AdmittedPairs(ranking, gap + 1, min_score_gap=cut.min_score_gap).num_pairs

        smallest = [np.array(edge + 1) for edge in equal_count_edges(count_above, min_gap - 1, most, num_levels)]
    return lambda first, last: AdmittedPairs(
        ranking, smallest[last], smallest[first - 1] - 1, min_score_gap=cut.min_score_gap
    )


def levels_by_score_gap(cut: Cut) -> PairsOfLevels:
    """Levels by score gap: of equal width between the smallest and the largest formed gap, or of equal count.

    With linear boundaries, levels 1 to ``k`` of ``B`` hold the gaps ``>= e_(B-k)``, ``e_0 < ... < e_B`` evenly spaced
    from the smallest to the largest gap of all prompts. A prompt may have no pair in a level.

    Source: the released code of arXiv:2405.13637 (linear).
    """
    ranking, num_levels, min_gap = cut.ranking, cut.num_levels, cut.min_rank_gap
    extent = cut.formed.extent
    largest = extent.max_score_gap
    if cut.boundaries == "linear":
        easy_first = np.linspace(extent.min_score_gap, largest, num_levels + 1)[::-1]
        # exclusive bounds: a gap is >= an edge exactly if it is > the next smaller float
        edges = [largest, *np.nextafter(easy_first[1:], 0).tolist()]
    else:

        def count_above(bits: int) -> int:
            return AdmittedPairs(ranking, min_gap, min_score_gap=_float_of(bits)).num_pairs

        low, high = _bits_of(cut.min_score_gap), _bits_of(largest)
        edges = [
            _float_of(bits) for bits in equal_count_edges(count_above, low, max(high, low + num_levels), num_levels)
        ]
    return lambda first, last: AdmittedPairs(
        ranking, min_gap, min_score_gap=max(edges[last], cut.min_score_gap), max_score_gap=edges[first - 1]
    )


def levels_by_score_gap_quantile(cut: Cut) -> PairsOfLevels:
    """Levels linear in the quantile of a score gap among all formed pairs, which are levels of equal count."""
    return levels_by_score_gap(replace(cut, boundaries="equal_count"))


def levels_by_margin(cut: Cut) -> PairsOfLevels:
    """Levels of equal count by the margin under the policy, ``value(chosen) - value(rejected)``, largest first.

    Equal margins, as before the first update, are ordered by rank gap, then by prompt and rank. Memory is O(pairs).

    Raises:
        ValueError: if boundaries are linear, or ``values`` have another shape or are not finite for a ranked sample.
    """
    if cut.boundaries != "equal_count":
        raise ValueError(f"`boundaries` must be 'equal_count' for the margin, got {cut.boundaries!r}")
    ranking = cut.ranking
    values = np.zeros(ranking.order.shape) if cut.values is None else np.asarray(cut.values, dtype=np.float64)
    if values.shape != ranking.order.shape:
        raise ValueError(f"`values` must be [prompt, sample] {ranking.order.shape}, got shape {values.shape}")
    is_ranked = np.isfinite(ranking.sorted_scores)
    if num_bad := np.count_nonzero(~np.isfinite(np.take_along_axis(values, ranking.order, axis=1)) & is_ranked):
        raise ValueError(f"`values` of {num_bad} ranked samples are not finite; check whether training diverged")
    return levels_by_value(cut, lambda pairs: values[pairs.prompt, pairs.chosen] - values[pairs.prompt, pairs.rejected])


def levels_by_value(cut: Cut, value_of: Callable[[PairArrays], NDArray[np.floating]]) -> PairsOfLevels:
    """Levels of equal count, or linear, by a value of each pair, largest first.

    Equal values are ordered by rank gap, then by prompt and rank. Memory is O(pairs).

    Args:
        value_of: pairs -> values ``[pair]``, large for easy pairs.
    """
    formed = cut.formed
    value, rank_gap = np.empty(formed.num_pairs), np.empty(formed.num_pairs, dtype=np.int32)
    for numbers, pairs in formed.chunks():
        value[numbers] = value_of(pairs)
        rank_gap[numbers] = pairs.rank_gap
    easy_first = np.lexsort((-rank_gap, -value))
    edges = [(level * formed.num_pairs) // cut.num_levels for level in range(cut.num_levels + 1)]
    if cut.boundaries == "linear" and formed.num_pairs:
        highest, lowest = value[easy_first[0]], value[easy_first[-1]]
        lower = highest - (highest - lowest) * np.arange(1, cut.num_levels) / cut.num_levels
        edges[1:-1] = np.searchsorted(-value[easy_first], -lower).tolist()  # a level includes its upper edge only
    return lambda first, last: ListedPairs(formed, np.sort(easy_first[edges[first - 1] : edges[last]]))


MEASURES: dict[str, Callable[[Cut], PairsOfLevels]] = {
    "rank_gap": levels_by_rank_gap,
    "score_gap": levels_by_score_gap,
    "score_gap_quantile": levels_by_score_gap_quantile,
    "margin": levels_by_margin,
}


def measure_function(name: str) -> Callable[[Cut], PairsOfLevels]:
    """A key of `MEASURES`, or a user's ``module:function``, which takes `PairArrays` and returns values ``[pair]``.

    Raises:
        CurriculumError: if a user's function cannot be imported, raises, or returns anything but one finite number per
            pair.
    """
    if name in MEASURES:
        return MEASURES[name]
    function = load_function("measure", name, CurriculumError)

    def value_of(pairs: PairArrays) -> NDArray[np.floating]:
        with attribute_errors("measure", name, CurriculumError):
            values = np.asarray(function(pairs), dtype=np.float64)
        if values.shape != (len(pairs),) or not np.isfinite(values).all():
            raise CurriculumError(
                f"measure `{name}`: must return one finite number for each of {len(pairs)} pairs, got an array of shape"
                f" {list(values.shape)}, {np.isfinite(values).sum()} of its values finite"
            )
        return values

    return lambda cut: levels_by_value(cut, value_of)


def accept_by_rank_gap(admitted: PairSet, formed: PairSet) -> Accept:
    """Accept a pair with probability rank gap / largest admitted rank gap."""
    return lambda pairs, words: unit_interval(words) * admitted.extent.max_rank_gap < pairs.rank_gap


def accept_by_score_gap(admitted: PairSet, formed: PairSet) -> Accept:
    """Accept a pair with probability score gap / largest admitted score gap."""
    return lambda pairs, words: unit_interval(words) * admitted.extent.max_score_gap < pairs.score_gap


def accept_by_score_gap_quantile(admitted: PairSet, formed: PairSet) -> Accept:
    """Accept a pair with the probability of its quantile: if its score gap is at least that of a random formed pair."""

    def accept(pairs: PairArrays, words: NDArray[np.uint64]) -> NDArray[np.bool_]:
        random_pairs = formed.at((words % np.uint64(formed.num_pairs)).astype(np.int64))
        return random_pairs.score_gap <= pairs.score_gap

    return accept


ACCEPTS: dict[str, Callable[[PairSet, PairSet], Accept]] = {
    "rank_gap": accept_by_rank_gap,
    "score_gap": accept_by_score_gap,
    "score_gap_quantile": accept_by_score_gap_quantile,
}
"""Measure -> acceptance of draws in proportion to it; a margin may be negative, so it has none."""


def equal_count_edges(count_above: Callable[[int], int], lowest: int, highest: int, num_levels: int) -> list[int]:
    """Edges ``e_0 > e_1 > ...`` of levels of equal count; level ``k`` holds the values in ``(e_k, e_(k-1)]``.

    Each edge brings the count above it nearest to ``k / num_levels`` of the total, and leaves at least one value for
    each other level. Equal values stay in one level.

    Args:
        count_above: number of values above its argument; must not increase.
        lowest, highest: ``e_B`` and ``e_0``; all values are in ``lowest + 1 .. highest``.
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
        error_low, error_high = (abs(above * num_levels - total * level) for above in (above_low, above_high))
        edges.append(low if error_low < error_high else high)
    return [*edges, lowest]


def _bits_of(value: float) -> int:
    """Map a number >= 0 to an integer of the same order, so that bisection needs at most 64 steps on any scale."""
    return int(np.float64(abs(value)).view(np.int64))


def _float_of(bits: int) -> float:
    return float(np.int64(bits).view(np.float64))

"""Levels of difficulty against brute force over all pairs."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from brute_force import MIN_SCORE_GAP, SCORES, Pair, formed_pairs, level_by_rank_gap, level_by_score_gap, rows
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cdpo_ray.curriculum.measures import MEASURES, Cut, equal_count_edges, measure_function
from cdpo_ray.curriculum.pairs import AdmittedPairs
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.errors import CurriculumError

MEASURE_AND_BOUNDARIES = st.sampled_from(
    [how for how in itertools.product(MEASURES, ("linear", "equal_count")) if how != ("margin", "linear")]
)


def levels(measure: str, cut: Cut) -> list[list[Pair]]:
    between = MEASURES[measure](cut)
    return [rows(between(level, level).all()) for level in range(1, cut.num_levels + 1)]


@given(SCORES, MIN_SCORE_GAP, MEASURE_AND_BOUNDARIES, st.data())
def test_every_formed_pair_is_in_exactly_one_level(
    scores: np.ndarray, min_score_gap: float, how: tuple[str, str], data: st.DataObject
) -> None:
    measure, boundaries = how
    num_levels = data.draw(st.integers(1, scores.shape[1] - 1))
    cut = Cut(rank_samples(scores), num_levels, boundaries, min_score_gap)
    found = levels(measure, cut)
    assert sorted(pair for level in found for pair in level) == sorted(formed_pairs(scores, min_score_gap))
    between = MEASURES[measure](cut)
    first = data.draw(st.integers(1, num_levels))
    last = data.draw(st.integers(first, num_levels))
    together = sorted(pair for level in found[first - 1 : last] for pair in level)
    assert sorted(rows(between(first, last).all())) == together


@given(SCORES, MIN_SCORE_GAP, st.data())
def test_linear_levels_of_rank_gaps_equal_brute_force(
    scores: np.ndarray, min_score_gap: float, data: st.DataObject
) -> None:
    num_levels = data.draw(st.integers(1, scores.shape[1] - 1))
    found = levels("rank_gap", Cut(rank_samples(scores), num_levels, "linear", min_score_gap))
    for level, pairs in enumerate(found, start=1):
        expected = [
            pair for pair in formed_pairs(scores, min_score_gap) if level_by_rank_gap(pair, scores, num_levels) == level
        ]
        assert sorted(pairs) == sorted(expected)


@given(SCORES, MIN_SCORE_GAP, st.integers(1, 12))
def test_linear_levels_of_score_gaps_equal_brute_force(
    scores: np.ndarray, min_score_gap: float, num_levels: int
) -> None:
    formed = formed_pairs(scores, min_score_gap)
    found = levels("score_gap", Cut(rank_samples(scores), num_levels, "linear", min_score_gap))
    for level, pairs in enumerate(found, start=1):
        expected = [pair for pair in formed if level_by_score_gap(pair, formed, num_levels) == level]
        assert sorted(pairs) == sorted(expected)


def test_linear_levels_of_score_gaps_have_the_sizes_of_the_released_code() -> None:
    """Its stages for one draw of 20 prompts x 50 Gaussian scores: each size is within the range of 30 draws."""
    sizes = []
    for seed in range(30):
        scores = np.random.default_rng(seed).normal(scale=0.0125, size=(20, 50))  # the spread of HPS v2.1, in its unit
        between = MEASURES["score_gap"](Cut(rank_samples(scores), 5, min_score_gap=0.02))
        sizes.append([between(1, stage).num_pairs for stage in range(1, 6)])
    for released, found in zip((6, 49, 424, 1905, 6093), zip(*sizes, strict=True), strict=True):
        assert min(found) <= released <= max(found)


def test_linear_levels_of_score_gaps_include_their_lower_edge() -> None:
    scores = np.array([[0.0, 1.0, 3.0, 6.0]])  # gaps 1 to 6: edges 1, 2.25, 3.5, 4.75, 6
    found = levels("score_gap", Cut(rank_samples(scores), 4, min_score_gap=0.5))
    assert [sorted(pair[4] for pair in level) for level in found] == [[5, 6], [], [3, 3], [1, 2]]
    found = levels("score_gap", Cut(rank_samples(scores), 5, min_score_gap=0.5))  # edges 1, 2, 3, 4, 5, 6
    assert [sorted(pair[4] for pair in level) for level in found] == [[5, 6], [], [3, 3], [2], [1]]


@given(SCORES, MIN_SCORE_GAP, st.sampled_from([("rank_gap", 3), ("score_gap", 4)]), st.data())
def test_levels_of_equal_count_respect_the_order_of_the_measure(
    scores: np.ndarray, min_score_gap: float, measure_and_column: tuple[str, int], data: st.DataObject
) -> None:
    measure, column = measure_and_column
    num_levels = data.draw(st.integers(1, scores.shape[1] - 1))
    found = levels(measure, Cut(rank_samples(scores), num_levels, "equal_count", min_score_gap))
    occupied = [[pair[column] for pair in level] for level in found if level]
    for easier, harder in itertools.pairwise(occupied):
        assert min(easier) > max(harder)  # so equal values stay in one level


@given(st.integers(2, 6), st.integers(2, 9), st.integers(1, 8), st.integers(0, 1000))
def test_distinct_score_gaps_are_divided_into_equal_counts(
    num_prompts: int, num_samples: int, num_levels: int, seed: int
) -> None:
    scores = np.random.default_rng(seed).normal(size=(num_prompts, num_samples))
    formed = sorted(formed_pairs(scores), key=lambda pair: -pair[4])
    assume(len({pair[4] for pair in formed}) == len(formed) >= num_levels)
    found = levels("score_gap", Cut(rank_samples(scores), num_levels, "equal_count"))
    ends = np.cumsum([len(level) for level in found])
    assert np.abs(ends - len(formed) * np.arange(1, num_levels + 1) / num_levels).max() <= 0.5
    assert [set(level) for level in found] == [
        set(formed[start:end]) for start, end in zip([0, *ends], ends, strict=False)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_linear_levels_of_quantiles_equal_score_gap_levels_of_equal_count(seed: int) -> None:
    ranking = rank_samples(np.random.default_rng(seed).normal(size=(4, 12)).round(1))
    equal_count = levels("score_gap", Cut(ranking, 5, "equal_count", 0.1))
    assert levels("score_gap_quantile", Cut(ranking, 5, "linear", 0.1)) == equal_count
    assert levels("score_gap_quantile", Cut(ranking, 5, "equal_count", 0.1)) == equal_count


@given(SCORES, MIN_SCORE_GAP, st.integers(1, 6), st.data())
def test_levels_of_margins_equal_brute_force(
    scores: np.ndarray, min_score_gap: float, num_levels: int, data: st.DataObject
) -> None:
    values = data.draw(hnp.arrays(np.float32, scores.shape, elements=st.integers(-3, 3)))
    formed = formed_pairs(scores, min_score_gap)
    margins = [
        float(values[prompt, chosen]) - float(values[prompt, rejected]) for prompt, chosen, rejected, *_ in formed
    ]
    easy_first = sorted(range(len(formed)), key=lambda number: (-margins[number], -formed[number][3], number))
    found = levels("margin", Cut(rank_samples(scores), num_levels, "equal_count", min_score_gap, values))
    edges = [level * len(formed) // num_levels for level in range(num_levels + 1)]
    for pairs, start, end in zip(found, edges, edges[1:], strict=False):
        assert pairs == [formed[number] for number in sorted(easy_first[start:end])]


@given(SCORES, st.data())
def test_margins_before_the_first_update_fall_back_to_the_rank_gap(scores: np.ndarray, data: st.DataObject) -> None:
    found = levels("margin", Cut(rank_samples(scores), 3, "equal_count"))
    gaps = [sorted((pair[3] for pair in level), reverse=True) for level in found]
    joined = [gap for level in gaps for gap in level]
    assert joined == sorted(joined, reverse=True)


def test_values_of_unranked_samples_may_be_missing() -> None:
    scores = np.array([[3.0, np.nan, 1.0, 2.0]])
    cut = Cut(rank_samples(scores), 1, "equal_count", values=np.array([[0.1, np.nan, 0.3, 0.2]]))
    assert len(levels("margin", cut)[0]) == 3


@pytest.mark.parametrize(
    ("measure", "changes", "message"),
    [
        ("rank_gap", {"num_levels": 6}, "`num_stages` is 6, but 6 images per prompt have only 5 rank gaps"),
        ("margin", {"boundaries": "linear"}, "`boundaries` must be 'equal_count' for the margin, got 'linear'"),
        ("margin", {"values": np.zeros((1, 5))}, r"`values` must be \[prompt, sample\] \(1, 6\), got shape \(1, 5\)"),
        ("margin", {"values": np.full((1, 6), np.nan)}, "`values` of 6 ranked samples are not finite"),
    ],
)
def test_an_impossible_cut_is_refused(measure: str, changes: dict, message: str) -> None:
    cut = Cut(
        **({"ranking": rank_samples(np.arange(6.0)[None]), "num_levels": 2, "boundaries": "equal_count"} | changes)
    )
    with pytest.raises(ValueError, match=message):
        MEASURES[measure](cut)


def best_edges(count_above: Callable[[int], int], lowest: int, highest: int, num_levels: int) -> list[int]:
    """Edges by the rule of `equal_count_edges`, found by trying every edge."""
    edges = [highest]
    for level in range(1, num_levels):
        possible = range(lowest + num_levels - level, edges[-1])
        missed = {edge: abs(count_above(edge) * num_levels - count_above(lowest) * level) for edge in possible}
        edges.append(max(edge for edge in possible if missed[edge] == min(missed.values())))
    return [*edges, lowest]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(-5, 5), st.data())
def test_edges_of_equal_count_are_the_nearest_possible(counts: list[int], lowest: int, data: st.DataObject) -> None:
    highest = lowest + len(counts)
    num_levels = data.draw(st.integers(1, len(counts)))

    def count_above(value: int) -> int:
        return sum(counts[value - lowest :])

    edges = equal_count_edges(count_above, lowest, highest, num_levels)
    assert edges == best_edges(count_above, lowest, highest, num_levels)
    assert all(easier > harder for easier, harder in itertools.pairwise(edges))


def test_equal_counts_of_eight_ranks_equal_hand_counts() -> None:
    """28 pairs, 7 gaps with 1 to 7 pairs: 6, 9, 6 and 7 are as near to 7 each as possible with whole gaps."""
    found = levels("rank_gap", Cut(rank_samples(np.arange(8.0)[None]), 4, "equal_count"))
    assert [sorted({pair[3] for pair in level}) for level in found] == [[5, 6, 7], [3, 4], [2], [1]]
    assert [len(level) for level in found] == [6, 9, 6, 7]


def test_the_released_codes_first_stage_holds_almost_no_pairs() -> None:
    """At most 0.005 % of the pairs for Gaussian scores; 4 % with the paper's measure."""
    ranking = rank_samples(np.random.default_rng(0).normal(size=(135, 500)))
    by_score, by_rank = (MEASURES[measure](Cut(ranking, 5))(1, 1).num_pairs for measure in ("score_gap", "rank_gap"))
    total = AdmittedPairs(ranking).num_pairs
    assert 0.000005 < by_score / total < 0.00005
    assert by_rank / total == pytest.approx(0.0405, abs=0.0001)


@given(SCORES, MIN_SCORE_GAP, st.integers(1, 6), st.sampled_from(["linear", "equal_count"]))
def test_levels_of_a_users_own_measure_equal_brute_force(
    scores: np.ndarray, min_score_gap: float, num_levels: int, boundaries: str
) -> None:
    cut = Cut(rank_samples(scores), num_levels, boundaries, min_score_gap)
    between = measure_function("own_objectives:distance_of_indices")(cut)
    formed = formed_pairs(scores, min_score_gap)
    values = [abs(chosen - rejected) for _, chosen, rejected, *_ in formed]
    easy_first = sorted(range(len(formed)), key=lambda number: (-values[number], -formed[number][3], number))
    for level in range(1, num_levels + 1):
        if boundaries == "equal_count":
            start, end = ((edge * len(formed)) // num_levels for edge in (level - 1, level))
            expected = [formed[number] for number in sorted(easy_first[start:end])]
        elif formed:
            highest, lowest = max(values), min(values)
            upper, lower = (highest - (highest - lowest) * edge / num_levels for edge in (level - 1, level))
            is_first, is_last = level == 1, level == num_levels
            expected = [
                pair
                for pair, value in zip(formed, values, strict=True)
                if (value <= upper or is_first) and (value > lower or is_last)
            ]
        else:
            expected = []
        assert rows(between(level, level).all()) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"^measure `own_objectives:broken` raised KeyError: 'no such thing' at .*own_objectives.py:\d+$"),
        ("not_finite", r"must return one finite number for each of 3 pairs, got an array of shape \[3\], 0 of its"),
        ("missing", r"^measure `own_objectives:missing`: cannot be imported: .*; the module must be installed"),
    ],
)
def test_a_faulty_measure_of_a_user_is_named(name: str, message: str) -> None:
    with pytest.raises(CurriculumError, match=message):
        measure_function(f"own_objectives:{name}")(Cut(rank_samples(np.array([[0.0, 1.0, 2.0]])), 2, "equal_count"))

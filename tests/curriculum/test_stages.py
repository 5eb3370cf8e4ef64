"""Levels of each stage, and their rank gaps against the paper's bounds in exact fractions."""

import subprocess
import sys
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpo_ray.curriculum.stages import admitted_gaps, admitted_levels, count_pairs, new_level, smallest_gap

RANKS_AND_STAGES = st.integers(2, 60).flatmap(lambda ranks: st.tuples(st.just(ranks), st.integers(1, ranks - 1)))


@given(RANKS_AND_STAGES)
def test_each_level_holds_the_gaps_of_the_papers_interval(ranks_and_stages: tuple[int, int]) -> None:
    num_ranks, num_stages = ranks_and_stages
    admitted: list[int] = []
    for stage in range(1, num_stages + 1):
        low = Fraction((num_ranks - 1) * (num_stages - stage), num_stages)
        high = Fraction((num_ranks - 1) * (num_stages - stage + 1), num_stages)
        gaps = [gap for gap in range(1, num_ranks) if low < gap <= high]
        first, last = admitted_gaps(num_ranks, num_stages, stage, stage)
        assert gaps and gaps == list(range(first, last + 1))
        admitted = gaps + admitted
        assert admitted_gaps(num_ranks, num_stages, 1, stage) == (admitted[0], admitted[-1])
    assert admitted == list(range(1, num_ranks))


@given(RANKS_AND_STAGES, st.integers(2, 6))
def test_levels_above_a_smallest_gap_are_those_of_fewer_ranks_moved_up(
    ranks_and_stages: tuple[int, int], min_gap: int
) -> None:
    num_ranks, num_stages = ranks_and_stages
    for stage in range(1, num_stages + 1):
        low, high = admitted_gaps(num_ranks, num_stages, stage, stage)
        moved = admitted_gaps(num_ranks + min_gap - 1, num_stages, stage, stage, min_gap=min_gap)
        assert moved == (low + min_gap - 1, high + min_gap - 1)


@given(st.integers(1, 12), st.integers(1, 20))
def test_with_more_levels_than_gaps_each_gap_has_one_level(num_ranks: int, num_stages: int) -> None:
    edges = [smallest_gap(num_ranks, num_stages, stage) for stage in range(num_stages + 1)]
    gaps = [gap for easier, edge in pairwise(edges) for gap in reversed(range(edge, easier))]
    assert gaps == list(range(num_ranks - 1, 0, -1))


@given(st.integers(0, 30), st.integers(-3, 35), st.integers(-3, 35))
def test_the_number_of_pairs_equals_brute_force(num_ranks: int, min_gap: int, max_gap: int) -> None:
    pairs = [(i, j) for j in range(num_ranks) for i in range(j) if min_gap <= j - i <= max_gap]
    assert count_pairs(num_ranks, min_gap, max_gap) == len(pairs)


def test_the_published_setting_admits_the_published_shares() -> None:
    counts = [count_pairs(500, *admitted_gaps(500, 5, level, level)) for level in range(1, 6)]
    assert admitted_gaps(500, 5, 1, 1) == (400, 499)
    assert counts[0] == 5050 and sum(counts) == 500 * 499 // 2
    assert Fraction(counts[0], sum(counts)) == Fraction(101, 2495)  # 4.05 %
    assert count_pairs(500, *admitted_gaps(500, 5, 1, 5)) == sum(counts)


def test_too_many_stages_are_refused() -> None:
    message = (
        "`num_stages` is 9, but 8 images per prompt have only 7 rank gaps of at least 1; lower it, or raise the images"
        " per prompt"
    )
    with pytest.raises(ValueError, match=message):
        admitted_gaps(8, 9, 1, 1)


@pytest.mark.parametrize(
    ("num_levels", "first", "last", "message"),
    [
        (0, 1, 1, "`num_levels` must be >= 1, got 0"),
        (5, 0, 1, r"levels must be in 1\.\.5, first to last, got 0\.\.1"),
        (5, 6, 6, r"levels must be in 1\.\.5, first to last, got 6\.\.6"),
        (5, 3, 2, r"levels must be in 1\.\.5, first to last, got 3\.\.2"),
    ],
)
def test_a_level_that_does_not_exist_is_refused(num_levels: int, first: int, last: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        admitted_gaps(8, num_levels, first, last)


def test_a_sliding_window_without_a_width_is_refused() -> None:
    with pytest.raises(ValueError, match="`window` must be given for a sliding window, got None"):
        admitted_levels(1, 5, pacing="sliding_window")


@pytest.mark.parametrize("stage", [0, 6])
def test_a_stage_that_does_not_exist_is_refused(stage: int) -> None:
    with pytest.raises(ValueError, match=rf"`stage` must be in 1\.\.5, got {stage}"):
        admitted_levels(stage, 5)


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        ({}, [(1, 1), (1, 2), (1, 3), (1, 4)]),
        ({"pacing": "one_stage"}, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ({"pacing": "sliding_window", "window": 2}, [(1, 1), (1, 2), (2, 3), (3, 4)]),
        ({"pacing": "sliding_window", "window": 9}, [(1, 1), (1, 2), (1, 3), (1, 4)]),
        ({"order": "hard_to_easy"}, [(4, 4), (3, 4), (2, 4), (1, 4)]),
        ({"order": "hard_to_easy", "pacing": "one_stage"}, [(4, 4), (3, 3), (2, 2), (1, 1)]),
        ({"order": "hard_to_easy", "pacing": "sliding_window", "window": 2}, [(4, 4), (3, 4), (2, 3), (1, 2)]),
        ({"order": "random", "pacing": "one_stage"}, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        ({"order": "shuffled", "pacing": "one_stage"}, [(1, 4)] * 4),
        ({"order": "none"}, [(1, 4)] * 4),
        ({"order": "best_against_worst"}, [(1, 4)] * 4),
    ],
)
def test_levels_of_four_stages_equal_hand_written_ones(changes: dict, levels: list[tuple[int, int]]) -> None:
    assert [admitted_levels(stage, 4, **changes) for stage in range(1, 5)] == levels


@pytest.mark.parametrize("pacing", ["cumulative", "one_stage", "sliding_window"])
@pytest.mark.parametrize("order", ["easy_to_hard", "hard_to_easy", "random", "shuffled", "none", "best_against_worst"])
def test_the_new_level_of_a_stage_is_the_one_that_no_earlier_stage_has(order: str, pacing: str) -> None:
    seen: set[int] = set()
    for stage in range(1, 5):
        first, last = admitted_levels(stage, 4, order=order, pacing=pacing, window=2)
        new = set(range(first, last + 1)) - seen
        if order in ("easy_to_hard", "hard_to_easy", "random"):
            assert {new_level(stage, 4, order=order)} == new
        else:
            assert new_level(stage, 4, order=order) is None
        seen |= new


def test_importing_the_stages_does_not_import_numpy() -> None:
    code = "import sys, cdpo_ray.curriculum.stages; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

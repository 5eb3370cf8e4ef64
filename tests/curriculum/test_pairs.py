"""Numbered pairs against brute force over all pairs."""

import itertools

import numpy as np
import pytest
from brute_force import MIN_SCORE_GAP, SCORES, Pair, chi_square_is_plausible, formed_pairs, rows
from hypothesis import given
from hypothesis import strategies as st

from cdpo_ray.curriculum import pairs as pairs_module
from cdpo_ray.curriculum.pairs import AdmittedPairs, ListedPairs, PairSet, ShuffledSlice, cap_per_prompt, concat
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.stages import count_pairs


def holds_exactly(found: PairSet, expected: list[Pair], num_prompts: int) -> bool:
    """Whether the set has exactly these pairs and the right extent."""
    pairs, extent = rows(found.all()), found.extent
    assert len(pairs) == len(set(pairs)) == found.num_pairs
    assert found.pairs_per_prompt.tolist() == [
        sum(pair[0] == prompt for pair in expected) for prompt in range(num_prompts)
    ]
    assert found.num_prompts == len({pair[0] for pair in expected})
    rank_gaps, score_gaps = [pair[3] for pair in expected] or [0], [pair[4] for pair in expected] or [0]
    assert (extent.min_rank_gap, extent.max_rank_gap) == (min(rank_gaps), max(rank_gaps))
    assert (extent.min_score_gap, extent.max_score_gap) == (min(score_gaps), max(score_gaps))
    return sorted(pairs) == sorted(expected)


@given(SCORES, MIN_SCORE_GAP, st.integers(1, 9), st.integers(0, 9), st.sampled_from([np.inf, 0.1, 0.2, 0.5, 3.0]))
def test_admitted_pairs_equal_brute_force(
    scores: np.ndarray, min_score_gap: float, min_gap: int, max_gap: int, max_score_gap: float
) -> None:
    admitted = AdmittedPairs(
        rank_samples(scores), min_gap, max_gap, min_score_gap=min_score_gap, max_score_gap=max_score_gap
    )
    expected = [
        pair
        for pair in formed_pairs(scores, min_score_gap)
        if min_gap <= pair[3] <= max_gap and pair[4] <= max_score_gap
    ]
    assert holds_exactly(admitted, expected, len(scores))


@given(SCORES, st.data())
def test_bounds_may_differ_by_prompt(scores: np.ndarray, data: st.DataObject) -> None:
    bounds = st.lists(st.integers(1, 8), min_size=len(scores), max_size=len(scores))
    low, high = data.draw(bounds), data.draw(bounds)
    expected = [pair for pair in formed_pairs(scores) if low[pair[0]] <= pair[3] <= high[pair[0]]]
    assert holds_exactly(AdmittedPairs(rank_samples(scores), low, high), expected, len(scores))


@given(st.integers(2, 12), st.data())
def test_distinct_scores_admit_the_closed_form_count(num_samples: int, data: st.DataObject) -> None:
    scores = np.array(data.draw(st.permutations(range(num_samples))), dtype=np.float64)[None]
    min_gap = data.draw(st.integers(1, num_samples))
    assert AdmittedPairs(rank_samples(scores), min_gap).num_pairs == count_pairs(num_samples, min_gap, num_samples)


@given(SCORES, st.randoms(use_true_random=False))
def test_a_prompts_pairs_do_not_depend_on_the_other_rows(scores: np.ndarray, random: object) -> None:
    shuffled = list(range(len(scores)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    in_order, moved = (AdmittedPairs(rank_samples(table), 1, 4) for table in (scores, scores[shuffled]))
    pairs = [(shuffled[prompt], *pair) for prompt, *pair in rows(moved.all())]
    assert sorted(pairs) == sorted(rows(in_order.all()))


@given(SCORES, st.data())
def test_listed_pairs_are_the_pairs_with_the_listed_numbers(scores: np.ndarray, data: st.DataObject) -> None:
    formed = AdmittedPairs(rank_samples(scores))
    numbers = data.draw(st.lists(st.integers(0, max(formed.num_pairs - 1, 0)), unique=True, max_size=formed.num_pairs))
    expected = [formed_pairs(scores)[number] for number in numbers]
    assert holds_exactly(ListedPairs(formed, np.array(numbers, dtype=np.int64)), expected, len(scores))


@given(SCORES, st.integers(0, 3), st.data())
def test_shuffled_slices_partition_the_pairs(scores: np.ndarray, seed: int, data: st.DataObject) -> None:
    formed = AdmittedPairs(rank_samples(scores))
    places = st.lists(st.integers(0, formed.num_pairs), max_size=3)
    cuts = [0, *sorted(data.draw(places)), formed.num_pairs]
    hands = [ShuffledSlice(formed, first, end, seed=seed) for first, end in itertools.pairwise(cuts)]
    assert [hand.num_pairs for hand in hands] == np.diff(cuts).tolist()
    assert sorted(pair for hand in hands for pair in rows(hand.all())) == sorted(formed_pairs(scores))
    assert all(holds_exactly(hand, rows(hand.all()), len(scores)) for hand in hands)


def test_every_pair_is_equally_often_in_a_shuffled_slice() -> None:
    formed = AdmittedPairs(rank_samples(np.random.default_rng(0).normal(size=(3, 8))))
    hands = [ShuffledSlice(formed, 0, 21, seed=seed).all().identity(8) for seed in range(2000)]
    counts = np.unique(np.concatenate(hands), return_counts=True)[1]
    # a slice holds a quarter of the 84 pairs, without replacement: the variance is a quarter less than with it
    assert chi_square_is_plausible(500 + (counts - 500) / np.sqrt(0.75), np.full(84, 500.0))


@given(SCORES, st.integers(1, 6), st.integers(0, 3), st.integers(1, 3))
def test_a_cap_keeps_a_bounded_subset_of_each_prompts_pairs(
    scores: np.ndarray, max_pairs: int, seed: int, stage: int
) -> None:
    formed = AdmittedPairs(rank_samples(scores))
    capped = cap_per_prompt(formed, max_pairs, seed=seed, stage=stage)
    assert capped.pairs_per_prompt.tolist() == np.minimum(formed.pairs_per_prompt, max_pairs).tolist()
    assert set(rows(capped.all())) <= set(formed_pairs(scores))


def test_a_cap_does_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = AdmittedPairs(rank_samples(np.random.default_rng(0).normal(size=(7, 12))))
    at_once = rows(cap_per_prompt(formed, 5, seed=0, stage=1).all())
    extent = ShuffledSlice(formed, 3, 200, seed=0).extent
    monkeypatch.setattr(pairs_module, "CHUNK_PAIRS", 10)
    assert rows(cap_per_prompt(formed, 5, seed=0, stage=1).all()) == at_once
    in_parts = ShuffledSlice(formed, 3, 200, seed=0).extent
    assert (in_parts.pairs_per_prompt == extent.pairs_per_prompt).all()
    assert (in_parts.min_score_gap, in_parts.max_score_gap) == (extent.min_score_gap, extent.max_score_gap)


def test_a_cap_chooses_every_pair_equally_often_and_differs_between_stages() -> None:
    formed = AdmittedPairs(rank_samples(np.random.default_rng(0).normal(size=(2, 8))))
    kept = [cap_per_prompt(formed, 7, seed=seed, stage=1).all().identity(8) for seed in range(2000)]
    counts = np.unique(np.concatenate(kept), return_counts=True)[1]
    assert len(counts) == 56 and np.abs(counts - 500).max() < 4.5 * np.sqrt(2000 * 0.25 * 0.75)
    assert kept[0].tolist() != cap_per_prompt(formed, 7, seed=0, stage=2).all().identity(8).tolist()


def test_a_pairs_identity_does_not_depend_on_the_labels() -> None:
    pairs = AdmittedPairs(rank_samples(np.random.default_rng(0).normal(size=(4, 6)))).all()
    swapped = type(pairs)(pairs.prompt, pairs.rejected, pairs.chosen, pairs.rank_gap, pairs.score_gap, pairs.draw)
    assert pairs.identity(6).tolist() == swapped.identity(6).tolist()
    assert len(set(pairs.identity(6).tolist())) == len(pairs) == 60


def test_concatenated_batches_keep_their_order() -> None:
    pairs = AdmittedPairs(rank_samples(np.random.default_rng(0).normal(size=(2, 5)))).all()
    assert rows(concat([pairs.take(np.arange(3)), pairs])) == rows(pairs)[:3] + rows(pairs)


def test_invalid_values_are_refused() -> None:
    ranking = rank_samples(np.arange(6.0)[None])
    with pytest.raises(ValueError, match="`min_gap` must be >= 1, got 0"):
        AdmittedPairs(ranking, 0, 5)
    for min_score_gap in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="`min_score_gap` must be >= 0, got"):
            AdmittedPairs(ranking, 1, 5, min_score_gap=min_score_gap)
    with pytest.raises(ValueError, match=r"`index` must be in 0\.\.14, got 3\.\.15"):
        AdmittedPairs(ranking, 1, 5).at(np.array([3, 15]))

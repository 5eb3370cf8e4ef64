"""Draws: uniform or weighted, addressed by number."""

import numpy as np
import pytest
from brute_force import chi_square_is_plausible, formed_pairs, rows

from cdpo_ray.curriculum.drawing import draw_pairs, sort_by_difficulty, swap_labels
from cdpo_ray.curriculum.measures import ACCEPTS
from cdpo_ray.curriculum.pairs import AdmittedPairs, PairArrays
from cdpo_ray.curriculum.ranking import rank_samples


def some_scores() -> np.ndarray:
    scores = np.random.default_rng(0).normal(size=(3, 9))
    scores[1, :4] = np.nan
    scores[2, :5] = 0.5
    return scores


def some_pairs(num_draws: int = 4000, *, seed: int = 0) -> PairArrays:
    ranking = rank_samples(np.random.default_rng(3).normal(size=(5, 20)))
    return draw_pairs(AdmittedPairs(ranking, 5), num_draws, seed=seed, stage=3)


def counts_of(drawn: PairArrays, expected: list[tuple]) -> np.ndarray:
    names, counts = np.unique(drawn.identity(9), return_counts=True)
    found = dict(zip(names.tolist(), counts.tolist(), strict=True))
    return np.array(
        [
            found.get((prompt * 9 + min(chosen, rejected)) * 9 + max(chosen, rejected), 0)
            for prompt, chosen, rejected, *_ in expected
        ]
    )


def test_draws_are_uniform() -> None:
    admitted, expected = AdmittedPairs(rank_samples(some_scores())), formed_pairs(some_scores())
    counts = counts_of(draw_pairs(admitted, 1000 * admitted.num_pairs, seed=1, stage=3), expected)
    assert admitted.num_pairs > 50
    assert chi_square_is_plausible(counts, np.full(admitted.num_pairs, 1000.0))


@pytest.mark.parametrize("measure", ["rank_gap", "score_gap", "score_gap_quantile"])
def test_weighted_draws_follow_the_measure(measure: str) -> None:
    """Draws from a subset of the pairs, to check that weights are those of the whole set."""
    formed = AdmittedPairs(rank_samples(some_scores()))
    admitted = AdmittedPairs(rank_samples(some_scores()), 3)
    every = formed_pairs(some_scores())
    expected = [pair for pair in every if pair[3] >= 3]
    weights = {
        "rank_gap": [pair[3] for pair in expected],
        "score_gap": [pair[4] for pair in expected],
        "score_gap_quantile": [sum(other[4] <= pair[4] for other in every) for pair in expected],
    }[measure]
    num_draws = 1000 * len(expected)
    drawn = draw_pairs(admitted, num_draws, seed=1, stage=3, accept=ACCEPTS[measure](admitted, formed))
    assert chi_square_is_plausible(counts_of(drawn, expected), num_draws * np.array(weights) / sum(weights))
    assert not chi_square_is_plausible(counts_of(drawn, expected), np.full(len(expected), 1000.0))


@pytest.mark.parametrize("measure", [None, *ACCEPTS])
def test_a_longer_draw_starts_with_the_same_pairs(measure: str | None) -> None:
    admitted = AdmittedPairs(rank_samples(np.random.default_rng(3).normal(size=(5, 20))))
    accept = ACCEPTS[measure](admitted, admitted) if measure else None
    none, short, long = (draw_pairs(admitted, count, seed=0, stage=3, accept=accept) for count in (0, 10, 1000))
    assert rows(short) == rows(long)[:10]
    assert long.draw.tolist() == list(range(1000))
    assert len(none) == 0


def test_draws_depend_on_seed_and_stage() -> None:
    admitted = AdmittedPairs(rank_samples(np.random.default_rng(3).normal(size=(5, 20))))
    for accept in (None, ACCEPTS["rank_gap"](admitted, admitted)):
        draws = [
            rows(draw_pairs(admitted, 50, seed=seed, stage=stage, accept=accept))
            for seed, stage in ((0, 1), (0, 2), (1, 1), (0, 1))
        ]
        assert draws[0] == draws[3] and draws[0] != draws[1] and draws[0] != draws[2] and draws[1] != draws[2]


def test_draws_do_not_change_between_versions() -> None:
    admitted = AdmittedPairs(rank_samples(np.arange(8.0).reshape(2, 4)))
    pinned = [(0, 3, 2), (0, 1, 0), (1, 2, 0), (0, 3, 1), (0, 2, 1)]
    assert [pair[:3] for pair in rows(draw_pairs(admitted, 5, seed=7, stage=1))] == pinned


def test_weights_dominated_by_one_outlier_are_refused() -> None:
    scores = np.zeros((400, 300)) + np.arange(300) * 1e-9
    scores[0, 0] = 1e9
    admitted = AdmittedPairs(rank_samples(scores), 1, 1)
    accept = ACCEPTS["score_gap"](admitted, admitted)
    with pytest.raises(
        ValueError, match=r"stage 1: \d+ of 20 weighted draws found no pair in 10000 attempts, .*outlying"
    ):
        draw_pairs(admitted, 20, seed=0, stage=1, accept=accept)


@pytest.mark.parametrize(
    ("probability", "low", "high"), [(0.0, 0, 0), (0.25, 0.22, 0.28), (0.5, 0.47, 0.53), (1.0, 1, 1)]
)
def test_labels_are_swapped_with_the_probability(probability: float, low: float, high: float) -> None:
    pairs = some_pairs()
    swapped = swap_labels(pairs, probability, seed=0, stage=3)
    moved = swapped.chosen != pairs.chosen
    assert low <= moved.mean() <= high
    assert (np.where(moved, swapped.rejected, swapped.chosen) == pairs.chosen).all()
    assert (np.where(moved, swapped.chosen, swapped.rejected) == pairs.rejected).all()
    assert (swapped.score_gap == pairs.score_gap).all() and (swapped.rank_gap == pairs.rank_gap).all()


def test_swapping_depends_on_the_draw_not_on_the_position() -> None:
    pairs = some_pairs(200)
    swapped_then_sorted = sort_by_difficulty(swap_labels(pairs, 0.5, seed=0, stage=3))
    sorted_then_swapped = swap_labels(sort_by_difficulty(pairs), 0.5, seed=0, stage=3)
    assert rows(swapped_then_sorted) == rows(sorted_then_swapped)
    assert rows(swap_labels(pairs, 0.5, seed=1, stage=3)) != rows(swap_labels(pairs, 0.5, seed=0, stage=3))


def test_pairs_are_sorted_from_easy_to_hard() -> None:
    pairs = some_pairs(300)
    in_order = sorted(range(300), key=lambda index: (-pairs.rank_gap[index], pairs.draw[index]))
    assert sort_by_difficulty(pairs).draw.tolist() == in_order
    assert rows(sort_by_difficulty(pairs)) == [rows(pairs)[index] for index in in_order]


def test_invalid_values_are_refused() -> None:
    admitted = AdmittedPairs(rank_samples(np.arange(6.0)[None]))
    with pytest.raises(ValueError, match="`num_draws` must be >= 0, got -1"):
        draw_pairs(admitted, -1, seed=0, stage=1)
    with pytest.raises(ValueError, match="stage 4 has no pair to draw from"):
        draw_pairs(AdmittedPairs(rank_samples(np.zeros((2, 3)))), 1, seed=0, stage=4)
    with pytest.raises(ValueError, match=r"`probability` must be in 0\.\.1, got 1.5"):
        swap_labels(admitted.all(), 1.5, seed=0, stage=1)

"""Combined scores against definitions evaluated sample by sample."""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from brute_force import formed_pairs
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cdpo_ray import config
from cdpo_ray.curriculum.combination import COMBINATIONS, RankingRule

SCORE = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.3, -1.5, 1e12, math.nan, math.inf]), st.floats(-9, 9, width=32))
SCORES = hnp.arrays(np.float64, st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(2, 3)), elements=SCORE)
WEIGHTS = {"a": 1.0, "b": -0.2, "c": 2.5}


def combine(rank_by: str, scores: np.ndarray) -> np.ndarray:
    return RankingRule(rank_by, dict(list(WEIGHTS.items())[: scores.shape[2]])).combine(scores)


def finite_samples(prompt: np.ndarray) -> list[int]:
    return [i for i, row in enumerate(prompt.tolist()) if all(map(math.isfinite, row))]


def by_definition(rank_by: str, prompt: list[list[float]]) -> list[float]:
    """Expected scores of a prompt's samples with finite scores ``[sample][reward]``."""
    columns = list(zip(*prompt, strict=True))
    if rank_by == "weighted_sum":
        total = [0.0] * len(prompt)
        for column, weight in zip(columns, WEIGHTS.values(), strict=False):
            exact = [Fraction(value) for value in column]
            mean = sum(exact) / len(exact)
            spread = statistics.pstdev(exact)
            for i, value in enumerate(exact):
                total[i] += weight * float(value - mean) / float(spread) if spread else 0.0
        return total
    if rank_by == "mean_rank":
        ranks = [[statistics.mean(places(column, value)) for value in column] for column in columns]
        return [-statistics.mean(each) for each in zip(*ranks, strict=True)]
    fronts: list[set[int]] = []
    while left := set(range(len(prompt))).difference(*fronts):
        fronts.append({i for i in left if not any(dominates(prompt[j], prompt[i]) for j in left)})
    return [-next(float(k) for k, front in enumerate(fronts) if i in front) for i in range(len(prompt))]


def places(column: tuple[float, ...], value: float) -> list[int]:
    return [place for place, other in enumerate(sorted(column, reverse=True)) if other == value]


def dominates(one: list[float], other: list[float]) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and one != other


@pytest.mark.parametrize("rank_by", COMBINATIONS)
@given(scores=SCORES)
def test_a_combination_equals_its_definition_on_samples_with_finite_scores(rank_by: str, scores: np.ndarray) -> None:
    combined = combine(rank_by, scores)
    assert combined.shape == scores.shape[:2]
    for prompt, found in zip(scores, combined, strict=True):
        whole = finite_samples(prompt)
        if whole:
            np.testing.assert_allclose(found[whole], by_definition(rank_by, prompt[whole].tolist()), atol=1e-6)
        assert np.isnan(np.delete(found, whole)).all()


@given(SCORES)
def test_no_rejected_sample_of_a_pareto_pair_dominates_the_chosen_and_fronts_form_no_pair(scores: np.ndarray) -> None:
    fronts = combine("pareto", scores)
    for prompt, chosen, rejected, _, score_gap in formed_pairs(fronts):
        assert not dominates(*scores[prompt, [rejected, chosen]].tolist())
        assert score_gap >= 1


@pytest.mark.parametrize("rank_by", COMBINATIONS)
def test_a_reward_with_equal_scores_has_no_influence(rank_by: str) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 6, 1))
    equal = np.broadcast_to(0.1, (3, 6, 1))
    combined = combine(rank_by, np.concatenate([scores, equal], axis=2))
    assert (np.argsort(combined) == np.argsort(scores[:, :, 0])).all()


def test_a_negative_weight_prefers_low_scores() -> None:
    scores = np.stack([np.zeros((1, 4)), [[1.0, 4.0, 2.0, 3.0]]], axis=2)
    assert np.argsort(-combine("weighted_sum", scores)).tolist() == [[0, 2, 3, 1]]


def test_a_weighted_sum_does_not_depend_on_units() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 8, 3))
    rescaled = scores * [1e-200, 1.0, 1e150] + [0, 7, 0]
    np.testing.assert_allclose(combine("weighted_sum", rescaled), combine("weighted_sum", scores), atol=1e-12)


def test_a_single_reward_ranks_by_its_unchanged_scores() -> None:
    scores = np.array([[[1.5], [np.nan], [-2.0]]])
    np.testing.assert_array_equal(RankingRule("clip", {"clip": 1.0}).combine(scores), scores[:, :, 0])


def test_scores_of_a_wrong_number_of_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[prompt, sample, reward\] of a, b, got shape \(1, 4, 3\)"):
        RankingRule("pareto", {"a": 1.0, "b": 1.0}).combine(np.zeros((1, 4, 3)))


def test_every_combination_of_the_config_is_implemented() -> None:
    assert tuple(COMBINATIONS) == config.COMBINATIONS

"""Noise from two scorings, against brute force over all pairs and against known simulated noise."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cdpo_ray.curriculum.combination import RankingRule
from cdpo_ray.curriculum.noise import gap_noise, score_noise

SCORE = st.one_of(st.floats(-9, 9, width=32), st.sampled_from([np.nan, np.inf]))
TWO_SCORINGS = hnp.arrays(np.float64, st.tuples(st.just(2), st.integers(1, 4), st.integers(1, 6)), elements=SCORE)


@given(TWO_SCORINGS)
def test_squared_gap_noise_is_half_the_mean_squared_difference_of_all_gaps(scorings: np.ndarray) -> None:
    halves = []
    for first, second in zip(*scorings.tolist(), strict=True):
        known = [pair for pair in zip(first, second, strict=True) if np.isfinite(pair).all()]
        for (one, one_again), (other, other_again) in itertools.combinations(known, 2):
            halves.append(((one - other) - (one_again - other_again)) ** 2 / 2)
    expected = np.sqrt(np.mean(halves)) if halves else np.nan
    np.testing.assert_allclose(gap_noise(*scorings), expected, rtol=1e-6, atol=1e-9)


@given(TWO_SCORINGS)
def test_squared_score_noise_is_half_the_mean_squared_difference_of_all_scores(scorings: np.ndarray) -> None:
    halves = [(a - b) ** 2 / 2 for a, b in scorings.reshape(2, -1).T.tolist() if np.isfinite([a, b]).all()]
    np.testing.assert_allclose(score_noise(*scorings), np.sqrt(np.mean(halves)) if halves else np.nan)


def scored_twice(noise: float, num_prompts: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True scores and two noisy scorings, each also with an offset per prompt."""
    random = np.random.default_rng(0)
    true = random.normal(size=(num_prompts, 8))
    first, second = (
        true + noise * random.normal(size=true.shape) + random.normal(size=(num_prompts, 1)) for _ in range(2)
    )
    return true, first, second


def test_gap_noise_recovers_simulated_noise_in_spite_of_offsets_per_prompt() -> None:
    true, first, second = scored_twice(0.3)
    gap_errors = (first[:, :1] - first[:, 1:]) - (true[:, :1] - true[:, 1:])
    assert gap_noise(first, second) == pytest.approx(0.3 * np.sqrt(2), rel=0.03)
    assert gap_noise(first, second) == pytest.approx(gap_errors.std(), rel=0.05)


def test_score_noise_recovers_simulated_noise() -> None:
    random = np.random.default_rng(1)
    first, second = 0.3 * random.normal(size=(2, 4000))
    assert score_noise(first, second) == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("rank_by", ["weighted_sum", "mean_rank"])
def test_noise_of_a_combined_gap_equals_its_deviation_over_many_scorings(rank_by: str) -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=(60, 1, 6, 2))
    scorings = true + np.array([0.2, 0.05]) * random.normal(size=(60, 200, 6, 2))
    rule = RankingRule(rank_by, {"a": 1.0, "b": -0.5})
    combined = rule.combine(scorings.reshape(-1, 6, 2)).reshape(60, 200, 6)
    gaps = combined[..., :, None] - combined[..., None, :]
    deviation = np.sqrt(gaps.var(axis=1, ddof=1)[:, ~np.eye(6, dtype=bool)].mean())
    found = gap_noise(*(combined[:, half].reshape(-1, 6) for half in (slice(0, 100), slice(100, 200))))
    assert found == pytest.approx(deviation, rel=0.05)


def test_a_deterministic_reward_has_no_noise() -> None:
    scores = np.random.default_rng(0).normal(size=(5, 4))
    assert gap_noise(scores, scores.copy()) == score_noise(scores, scores.copy()) == 0

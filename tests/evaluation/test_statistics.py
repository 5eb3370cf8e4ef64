from itertools import combinations, product

import numpy as np
import pytest

from cdpo_ray.evaluation.statistics import (
    bootstrap_mean,
    bootstrap_over_runs,
    compare_scores,
    pair_agreement,
    rank_correlation,
)


def test_interval_of_a_normal_sample_agrees_with_normal_theory() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2_000)
    found = bootstrap_mean(values, num_resamples=4_000, seed=1)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert found.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    found = [bootstrap_mean(rng.exponential(size=60), num_resamples=400, seed=seed) for seed in range(300)]
    assert 0.88 <= np.mean([interval.low <= 1 <= interval.high for interval in found]) <= 0.98


def test_equal_values_have_an_interval_of_width_0() -> None:
    found = bootstrap_mean(np.full(9, 0.25), num_resamples=100, seed=0)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_mean(values, num_resamples=100, seed=4) == bootstrap_mean(values, num_resamples=100, seed=4)


@pytest.mark.parametrize("values", [np.array([]), np.array([1.0, np.nan]), np.ones((2, 2))])
def test_empty_or_non_finite_values_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be \[prompt\], finite and not empty"):
        bootstrap_mean(values, num_resamples=100, seed=0)


def test_interval_over_runs_equals_that_of_all_possible_draws() -> None:
    values = np.random.default_rng(3).normal(size=(2, 4))
    means = [
        values[np.ix_(runs, prompts)].mean()
        for runs in product(range(2), repeat=2)
        for prompts in product(range(4), repeat=4)
    ]
    found = bootstrap_over_runs(values, num_resamples=400_000, seed=0, confidence=0.8)
    low, high = np.quantile(means, [0.1, 0.9])
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)


def test_spread_over_runs_and_prompts_is_the_sum_of_both() -> None:
    """For values ``run + prompt``, the variance is var(run) / runs + var(prompt) / prompts."""
    rng = np.random.default_rng(4)
    of_run, of_prompt = rng.normal(0, 1, size=200), rng.normal(0, 2, size=300)
    found = bootstrap_over_runs(of_run[:, None] + of_prompt, num_resamples=8_000, seed=0)
    half_width = 1.96 * np.sqrt(of_run.var() / 200 + of_prompt.var() / 300)
    assert found.high - found.mean == pytest.approx(half_width, rel=0.06)
    assert found.mean - found.low == pytest.approx(half_width, rel=0.06)


def test_interval_of_one_run_is_the_interval_over_prompts() -> None:
    values = np.random.default_rng(0).normal(size=(1, 500))
    over_runs = bootstrap_over_runs(values, num_resamples=8_000, seed=0)
    over_prompts = bootstrap_mean(values[0], num_resamples=8_000, seed=1)
    assert (over_runs.low, over_runs.high) == pytest.approx((over_prompts.low, over_prompts.high), abs=0.01)


def test_runs_that_disagree_widen_the_interval_for_any_number_of_prompts() -> None:
    values = np.repeat([[-1.0], [1.0], [3.0]], 2_000, axis=1)
    found = bootstrap_over_runs(values, num_resamples=4_000, seed=0)
    assert (found.mean, found.low, found.high) == pytest.approx((1, -1, 3))


@pytest.mark.parametrize("values", [np.ones((0, 3)), np.ones((3, 0)), np.ones(3), np.array([[1.0, np.inf]])])
def test_empty_or_non_finite_values_of_runs_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be \[run, prompt\], finite and not empty"):
        bootstrap_over_runs(values, num_resamples=100, seed=0)


def test_comparison_equals_brute_force_with_ties_and_missing_scores() -> None:
    rng = np.random.default_rng(5)
    base = rng.integers(0, 4, size=(7, 3)).astype(float)
    tuned = rng.integers(0, 4, size=(7, 3)).astype(float)
    base[0, 0], tuned[1, 2], tuned[2] = np.nan, np.inf, np.nan
    found = compare_scores(base, tuned, num_resamples=100, seed=0)
    differences, wins = [], []
    for row in (0, 1, 3, 4, 5, 6):  # prompt 2 has no score left
        pairs = [(b, t) for b, t in zip(base[row], tuned[row], strict=True) if np.isfinite([b, t]).all()]
        differences.append(np.mean([t - b for b, t in pairs]))
        wins.append(np.mean([1.0 if t > b else 0.5 if t == b else 0.0 for b, t in pairs]))
    assert found.difference.mean == pytest.approx(np.mean(differences))
    assert found.win_rate.mean == pytest.approx(np.mean(wins))
    assert found.difference.mean == pytest.approx(found.tuned.mean - found.base.mean)
    assert found.num_missing == 5


def test_pairing_makes_a_small_constant_gain_significant() -> None:
    base = np.random.default_rng(0).normal(0, 5, size=(40, 4))
    found = compare_scores(base, base + 0.1, num_resamples=200, seed=0)
    assert found.difference.low == pytest.approx(0.1)
    assert found.base.high - found.base.low > 1
    assert found.win_rate.mean == 1


def test_different_shapes_and_judges_without_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must both be \[prompt, image\], got \(2, 3\) and \(3, 2\)"):
        compare_scores(np.ones((2, 3)), np.ones((3, 2)), num_resamples=100, seed=0)
    with pytest.raises(ValueError, match="no image has a finite score of both models"):
        compare_scores(np.full((2, 3), np.nan), np.ones((2, 3)), num_resamples=100, seed=0)


def with_ties_and_gaps() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    one, other = rng.integers(0, 4, size=(2, 9, 6)).astype(float)
    one[0, 2], other[1, 4], other[2], one[3] = np.nan, np.inf, np.nan, 1.0
    return one, other


def pairs_of(one: np.ndarray, other: np.ndarray) -> list[tuple[float, float]]:
    """Differences of ``one`` and ``other`` for each pair of images with finite scores."""
    finite = [place for place in range(len(one)) if np.isfinite([one[place], other[place]]).all()]
    return [(one[a] - one[b], other[a] - other[b]) for a, b in combinations(finite, 2)]


def test_agreement_equals_counting_pairs_with_ties_and_missing_scores() -> None:
    values, scores = with_ties_and_gaps()
    expected = []
    for row in range(len(values)):
        decided = [(value, score) for value, score in pairs_of(values[row], scores[row]) if score != 0]
        agreed = [0.5 if value == 0 else float((value > 0) == (score > 0)) for value, score in decided]
        expected.append(np.mean(agreed) if agreed else np.nan)
    np.testing.assert_allclose(pair_agreement(values, scores), expected)
    assert expected[3] == 0.5 and np.isnan(expected[2])


def test_equal_values_agree_with_half_of_the_pairs_and_the_scores_themselves_with_all() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 5))
    np.testing.assert_array_equal(pair_agreement(np.zeros_like(scores), scores), 0.5)
    np.testing.assert_array_equal(pair_agreement(scores, scores), 1)
    np.testing.assert_array_equal(pair_agreement(-scores, scores), 0)


def test_rank_correlation_equals_kendalls_tau_b_by_counting_pairs() -> None:
    one, other = with_ties_and_gaps()
    expected = []
    for row in range(len(one)):
        pairs = pairs_of(one[row], other[row])
        agreed = sum(a * b > 0 for a, b in pairs) - sum(a * b < 0 for a, b in pairs)
        untied = sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs)
        expected.append(agreed / np.sqrt(untied) if untied else np.nan)
    np.testing.assert_allclose(rank_correlation(one, other), expected)
    assert np.isnan(expected[3]), "a judge with equal scores for all images has no order"

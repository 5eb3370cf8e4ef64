import functools
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest

from cdpo_ray.evaluation.statistics import (
    Interval,
    NoInterval,
    bootstrap_mean,
    compare_by_category,
    compare_scores,
    mean_over_runs,
    pair_agreement,
    rank_correlation,
    student_t_quantile,
    variance_of_mean,
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
    found = bootstrap_mean(np.full(10, 0.25), num_resamples=100, seed=0)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap_mean(values, num_resamples=100, seed=4) == bootstrap_mean(values, num_resamples=100, seed=4)


@pytest.mark.parametrize("values", [np.array([]), np.array([1.0, np.nan]), np.ones((2, 2))])
def test_empty_or_non_finite_values_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be \[prompt\], finite and not empty"):
        bootstrap_mean(values, num_resamples=100, seed=0)


@pytest.mark.parametrize("num_prompts", [1, 9])
def test_fewer_than_10_prompts_have_a_mean_and_no_interval(num_prompts: int) -> None:
    found = bootstrap_mean(np.full(num_prompts, 0.1), num_resamples=100, seed=0)
    assert found == NoInterval(0.1, f"an interval needs at least 10 prompts, got {num_prompts}")
    assert isinstance(bootstrap_mean(np.full(10, 0.1), num_resamples=100, seed=0), Interval)


def mean_squares(values: np.ndarray) -> tuple[float, float, float]:
    """Of runs, prompts and residual, by loops over the cells of ``[run, prompt]``."""
    num_runs, num_prompts = values.shape
    of_run = of_prompt = residual = 0.0
    for run in range(num_runs):
        for prompt in range(num_prompts):
            fitted_run, fitted_prompt = values[run].mean(), values[:, prompt].mean()
            of_run += (fitted_run - values.mean()) ** 2
            of_prompt += (fitted_prompt - values.mean()) ** 2
            residual += (values[run, prompt] - fitted_run - fitted_prompt + values.mean()) ** 2
    return of_run / (num_runs - 1), of_prompt / (num_prompts - 1), residual / (num_runs - 1) / (num_prompts - 1)


@pytest.mark.parametrize(
    ("run_sd", "prompt_sd", "clipped"), [(1.0, 2.0, ""), (0.0, 2.0, "run"), (1.0, 0.0, "prompt"), (0.0, 0.0, "both")]
)
def test_variance_of_the_mean_equals_the_analysis_of_variance_by_loops(
    run_sd: float, prompt_sd: float, clipped: str
) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(60, 4, 12))
    values += run_sd * rng.normal(size=(60, 4, 1)) + prompt_sd * rng.normal(size=(60, 1, 12))
    variances, degrees = variance_of_mean(values)
    seen = set()
    for of_one, variance, degrees_of_freedom in zip(values, variances, degrees, strict=True):
        run, prompt, residual = mean_squares(of_one)
        seen.add({(1, 1): "", (0, 1): "run", (1, 0): "prompt", (0, 0): "both"}[run > residual, prompt > residual])
        total = max(run + prompt - residual, run, prompt)
        assert variance == pytest.approx(total / (4 * 12))
        satterthwaite = total**2 / (run**2 / 3 + prompt**2 / 11 + residual**2 / 33)
        assert degrees_of_freedom == pytest.approx(max(3, satterthwaite))
    assert clipped in seen, "the case with a negative estimate must occur"


def test_the_interval_over_runs_is_the_mean_and_the_quantile_times_the_standard_error() -> None:
    values = np.random.default_rng(2).normal(size=(4, 12))
    found = mean_over_runs(values, confidence=0.9)
    variance, degrees_of_freedom = variance_of_mean(values)
    reach = student_t_quantile(0.9, float(degrees_of_freedom)) * np.sqrt(variance)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - reach, values.mean() + reach)
    )


def test_runs_that_agree_give_the_interval_of_their_prompts_and_prompts_that_agree_that_of_the_runs() -> None:
    """Closed forms: one factor alone is Student's t of its means, with its degrees of freedom."""
    means = np.random.default_rng(0).normal(size=12)
    of_prompts = mean_over_runs(np.tile(means, (3, 1)))
    assert of_prompts.high - of_prompts.mean == pytest.approx(2.200985 * means.std(ddof=1) / np.sqrt(12))
    of_runs = mean_over_runs(np.repeat([[-1.0], [1.0], [3.0]], 2_000, axis=1))
    assert (of_runs.mean, of_runs.low) == pytest.approx((1, 1 - 4.302653 * 2 / np.sqrt(3)))


def test_equal_values_of_all_runs_have_an_interval_of_width_0() -> None:
    assert mean_over_runs(np.zeros((3, 10))) == Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("degrees_of_freedom", "expected"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (10, 2.228139), (30, 2.042272), (120, 1.979930)],
)
def test_students_quantile_agrees_with_the_published_table(degrees_of_freedom: int, expected: float) -> None:
    assert student_t_quantile(0.95, degrees_of_freedom) == pytest.approx(expected, rel=1e-5)


def test_students_quantile_has_its_closed_forms_and_the_normal_limit() -> None:
    for confidence in (0.5, 0.8, 0.95, 0.999):
        one, two = np.tan(np.pi * confidence / 2), confidence * np.sqrt(2 / (1 - confidence**2))
        assert student_t_quantile(confidence, 1) == pytest.approx(one, rel=1e-5)
        assert student_t_quantile(confidence, 2) == pytest.approx(two, rel=1e-5)
        normal = NormalDist().inv_cdf((1 + confidence) / 2)
        assert student_t_quantile(confidence, 1e5) == pytest.approx(normal, rel=5e-4)
    between = student_t_quantile(0.95, 3.0), student_t_quantile(0.95, 2.5), student_t_quantile(0.95, 2.0)
    assert between == tuple(sorted(between))


@functools.cache
def quantiles() -> tuple[np.ndarray, np.ndarray]:
    """Inverse degrees of freedom, ascending, and the quantile at each, for interpolation."""
    inverse = np.linspace(1e-5, 1, 60)
    return inverse, np.array([student_t_quantile(0.95, 1 / float(at)) for at in inverse])


def false_verdict_rate(
    num_runs: int, num_prompts: int, *, run_sd: float, prompt_sd: float, residual_sd: float, num_draws: int = 2_000
) -> float:
    """How often a nominal 95 % interval excludes the true mean, which is 0, in simulated normal effects."""
    rng = np.random.default_rng([num_runs, num_prompts])
    values = residual_sd * rng.standard_normal((num_draws, num_runs, num_prompts))
    values += run_sd * rng.standard_normal((num_draws, num_runs, 1))
    values += prompt_sd * rng.standard_normal((num_draws, 1, num_prompts))
    variances, degrees = variance_of_mean(values)
    reach = np.interp(1 / degrees, *quantiles()) * np.sqrt(variances)
    return float(np.mean(np.abs(values.mean(axis=(1, 2))) > reach))


SIZES = [(3, 96), (3, 600), (4, 300), (8, 96)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("run_sd", "prompt_sd"), [(0.02, 0.1), (0.04, 0.1), (0.04, 0.2)])
def test_a_true_mean_is_rejected_in_3_to_8_per_cent_at_a_nominal_5(
    size: tuple[int, int], run_sd: float, prompt_sd: float
) -> None:
    """Standard deviations like those of the share of attributes right in `benchmarks/ablation.py`."""
    assert 0.03 <= false_verdict_rate(*size, run_sd=run_sd, prompt_sd=prompt_sd, residual_sd=0.2) <= 0.08


@pytest.mark.parametrize("size", SIZES)
def test_a_true_mean_is_rejected_in_at_most_5_per_cent_if_runs_do_not_differ(size: tuple[int, int]) -> None:
    assert 0.015 <= false_verdict_rate(*size, run_sd=0.0, prompt_sd=0.1, residual_sd=0.2) <= 0.05


def test_2_runs_would_give_too_many_false_verdicts_and_have_no_interval() -> None:
    assert false_verdict_rate(2, 96, run_sd=0.1, prompt_sd=0.1, residual_sd=0.2) > 0.09
    reason = "an interval needs at least 3 runs, got 2"
    assert mean_over_runs(np.ones((2, 96))) == NoInterval(1.0, reason)
    assert mean_over_runs(np.ones((2, 4))) == NoInterval(
        1.0, "an interval needs at least 3 runs and 10 prompts, got 2 and 4"
    )


@pytest.mark.parametrize("values", [np.ones((0, 3)), np.ones((3, 0)), np.ones(3), np.array([[1.0, np.inf]])])
def test_empty_or_non_finite_values_of_runs_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be \[run, prompt\], finite and not empty"):
        mean_over_runs(values)


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


def test_categories_are_compared_apart_with_confidence_divided_by_their_number() -> None:
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(size=(2, 45, 2))
    names = ["few"] * 5 + ["b", "a"] * 15 + [None] * 10
    found = compare_by_category(base, tuned, names, num_resamples=200, seed=3)
    assert list(found) == ["few", "b", "a"]
    for name, confidence in {"a": 0.975, "b": 0.975}.items():
        inside = [place for place, each in enumerate(names) if each == name]
        alone = functools.partial(compare_scores, base[inside], tuned[inside], num_resamples=200, seed=3)
        assert found[name] == alone(confidence=confidence) != alone(), "two categories have an interval"
    assert found["few"] is not None and found["few"].difference.mean == pytest.approx((tuned - base)[:5].mean())
    assert getattr(found["few"].difference, "no_interval", "").endswith("got 5")


def test_a_category_without_scores_is_none_and_does_not_widen_the_other_intervals() -> None:
    base, tuned = np.zeros((24, 1)), np.random.default_rng(0).normal(size=(24, 1))
    base[12:] = np.nan
    found = compare_by_category(base, tuned, ["a"] * 12 + ["b"] * 12, num_resamples=200, seed=0)
    assert found["b"] is None
    assert found["a"] == compare_scores(base[:12], tuned[:12], num_resamples=200, seed=0)


@pytest.mark.parametrize(("corrected", "low", "high"), [(True, 0.1, 0.3), (False, 0.45, 0.75)])
def test_the_correction_lowers_the_rate_of_any_false_verdict_of_ten_small_categories(
    corrected: bool, low: float, high: float
) -> None:
    """Nominal: 5 %; `docs/log.md` has the figures of more trials."""
    rng, num_false = np.random.default_rng(1), 0
    names = [name for name in range(10) for _ in range(10 + 3 * name)]
    for _ in range(100):
        base, tuned = np.zeros((len(names), 1)), rng.normal(size=(len(names), 1))
        if corrected:
            found = compare_by_category(base, tuned, list(map(str, names)), num_resamples=300, seed=0)
            differences = [each.difference for each in found.values() if each]
        else:
            differences = [
                bootstrap_mean(tuned[np.equal(names, name), 0], num_resamples=300, seed=0) for name in range(10)
            ]
        num_false += any(isinstance(each, Interval) and each.low * each.high > 0 for each in differences)
    assert low <= num_false / 100 <= high


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

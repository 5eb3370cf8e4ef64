"""Reliability of the order by margin against brute force, a second measurement, and closed forms."""

import numpy as np
import pytest

from cdpo_ray.curriculum import reliability
from cdpo_ray.curriculum.pairs import AdmittedPairs
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.reliability import correlation_of_more_draws, low_reliability, margin_reliability


def spearman(one: list[float], other: list[float]) -> float:
    """Pearson's correlation of the ranks; a rank is the number of smaller values plus half the number of equal ones."""
    ranks = []
    for values in (np.array(one), np.array(other)):
        ranks.append([(values < value).sum() + (values == value).sum() / 2 for value in values])
    return float(np.corrcoef(*ranks)[0, 1])


def measured(num_draws: int, noise: float, *, seed: int, true: np.ndarray) -> np.ndarray:
    """Values ``[draw, prompt, sample]`` with independent noise of each draw."""
    return true + noise * np.random.default_rng(seed).normal(size=(num_draws, *true.shape))


def margins_of(values: np.ndarray, scores: np.ndarray) -> list[float]:
    return [
        values[prompt, one] - values[prompt, other]
        for prompt, row in enumerate(scores)
        for one in range(len(row))
        for other in range(len(row))
        if row[one] - row[other] > 0.5
    ]


@pytest.mark.parametrize("num_draws", [2, 3, 6, 7])
def test_reliability_equals_brute_force(num_draws: int) -> None:
    random = np.random.default_rng(num_draws)
    scores, values = random.normal(size=(4, 6)), random.normal(size=(num_draws, 4, 6)).round(1)  # with ties
    values += random.normal(size=(4, 6))
    half = num_draws // 2
    halves = [values[[2 * n + first for n in range(half)]].mean(axis=0) for first in (0, 1)]
    r = spearman(*(margins_of(half_values, scores) for half_values in halves))
    k = num_draws / half
    found = margin_reliability(values, AdmittedPairs(rank_samples(scores), min_score_gap=0.5))
    assert found == pytest.approx(k * r / (1 + (k - 1) * r), abs=1e-12)


@pytest.mark.parametrize(("num_draws", "noise"), [(4, 1.0), (4, 3.0), (16, 3.0), (5, 2.0)])
def test_reliability_is_the_correlation_with_another_measurement(num_draws: int, noise: float) -> None:
    random = np.random.default_rng(0)
    scores, true = random.normal(size=(60, 10)), random.normal(size=(60, 10))
    one, other = (measured(num_draws, noise, seed=seed, true=true) for seed in (1, 2))
    formed = AdmittedPairs(rank_samples(scores))
    pairs = formed.all()
    margins = [
        values[pairs.prompt, pairs.chosen] - values[pairs.prompt, pairs.rejected]
        for values in (one.mean(axis=0), other.mean(axis=0))
    ]
    assert margin_reliability(one, formed) == pytest.approx(spearman(*margins), abs=0.04)


def test_the_correlation_of_more_draws_is_that_of_a_mean_with_less_noise() -> None:
    """Signal variance 1 and noise variance s per draw: n draws correlate by 1 / (1 + s/n)."""
    for spread, few, many in ((2.0, 1, 4), (0.5, 4, 16), (7.0, 3, 2)):
        assert correlation_of_more_draws(1 / (1 + spread / few), many / few) == pytest.approx(1 / (1 + spread / many))


def test_a_subset_of_many_pairs_gives_nearly_the_same_reliability(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=(60, 20))
    formed, values = AdmittedPairs(rank_samples(random.normal(size=(60, 20)))), measured(4, 1.5, seed=1, true=true)
    whole = margin_reliability(values, formed)
    monkeypatch.setattr(reliability, "MAX_PAIRS", 3000)
    assert margin_reliability(values, formed) == pytest.approx(whole, abs=0.02)


def test_reliability_is_unknown_of_one_draw_of_equal_margins_and_of_no_pairs() -> None:
    formed = AdmittedPairs(rank_samples(np.arange(8.0).reshape(2, 4)))
    assert margin_reliability(np.random.default_rng(0).normal(size=(1, 2, 4)), formed) is None
    assert margin_reliability(np.zeros((4, 2, 4)), formed) is None
    assert margin_reliability(np.ones((4, 2, 4)), AdmittedPairs(rank_samples(np.ones((2, 4))))) is None


def test_halves_of_opposite_order_are_not_reliable() -> None:
    formed = AdmittedPairs(rank_samples(np.arange(4.0)[None]))
    assert margin_reliability(np.array([[[0.0, 1, 2, 4]], [[0.0, -1, -2, -4]]]), formed) == 0


def test_a_warning_names_the_number_of_draws_that_is_enough() -> None:
    assert low_reliability(2, 0.5, 4) == (
        "stage 2: the reliability of the order by margin is 0.50, below 0.8, so another measurement would order many"
        " pairs differently; raise `curriculum.num_margin_draws` from 4 to about 16"
    )
    assert correlation_of_more_draws(0.5, 16 / 4) == pytest.approx(0.8)
    assert (low_reliability(2, 0.799, 4) or "").endswith("from 4 to about 5")
    assert (low_reliability(2, 0.0, 4) or "").endswith("raise `curriculum.num_margin_draws` from 4")


@pytest.mark.parametrize("known", [0.8, 0.97, 1.0, None])
def test_a_reliable_order_or_an_unknown_reliability_is_no_warning(known: float | None) -> None:
    assert low_reliability(1, known, 16) is None


@pytest.mark.parametrize(("correlation", "share"), [(0.8, 0.54), (0.95, 0.74)])
def test_two_measurements_agree_on_the_documented_share_of_levels(correlation: float, share: float) -> None:
    random, size = np.random.default_rng(0), 200_000
    one = random.normal(size=size)
    other = correlation * one + np.sqrt(1 - correlation**2) * random.normal(size=size)
    levels = [np.searchsorted(np.quantile(values, (0.25, 0.5, 0.75)), values) for values in (one, other)]
    assert np.mean(levels[0] == levels[1]) == pytest.approx(share, abs=0.01)

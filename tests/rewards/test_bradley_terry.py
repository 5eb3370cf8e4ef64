"""Bradley-Terry strengths: closed form, brute force, planted strengths and position bias."""

import itertools

import numpy as np
import pytest

from cdpo_ray.rewards.bradley_terry import SMOOTHING, bradley_terry

NAN = float("nan")


def logit(share: float) -> float:
    smoothed = (share + SMOOTHING) / (1 + 2 * SMOOTHING)
    return float(np.log(smoothed / (1 - smoothed)))


def planted(strengths: np.ndarray, position: float) -> np.ndarray:
    """Choices that are smoothed to exactly these log odds."""
    share = 1 / (1 + np.exp(-(strengths[:, None] - strengths[None] + position)))
    return share * (1 + 2 * SMOOTHING) - SMOOTHING


@pytest.mark.parametrize(("one_first", "other_first"), [(0.9, 0.3), (1.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.2, 0.7)])
def test_two_images_have_the_closed_form(one_first: float, other_first: float) -> None:
    strengths, position = bradley_terry(np.array([[NAN, one_first], [other_first, NAN]]))
    half = (logit(one_first) - logit(other_first)) / 4
    assert strengths == pytest.approx([half, -half], abs=1e-9)
    assert position == pytest.approx((logit(one_first) + logit(other_first)) / 2, abs=1e-9)


def test_three_images_have_the_highest_likelihood_of_a_grid() -> None:
    preferred = np.array([[NAN, 0.9, 0.4], [0.3, NAN, 0.8], [1.0, 0.1, NAN]])

    def log_likelihood(first: np.ndarray, second: np.ndarray, position: np.ndarray) -> np.ndarray:
        at, total = (first, second, -first - second), np.zeros_like(first)
        for i, j in itertools.permutations(range(3), 2):
            share = (preferred[i, j] + SMOOTHING) / (1 + 2 * SMOOTHING)
            won = 1 / (1 + np.exp(-(at[i] - at[j] + position)))
            total += share * np.log(won) + (1 - share) * np.log(1 - won)
        return total

    step = 0.05
    grid = np.array(np.meshgrid(*[np.arange(-2, 2, step)] * 3)).reshape(3, -1)
    values = log_likelihood(*grid)
    strengths, position = bradley_terry(preferred)
    assert [*strengths[:2], position] == pytest.approx(grid[:, values.argmax()], abs=step)
    assert log_likelihood(*np.array([*strengths[:2], position])[:, None])[0] >= values.max()
    assert strengths.sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("position", [0.0, 1.5, -2.0])
def test_planted_strengths_and_a_planted_position_bias_are_found(position: float) -> None:
    given = np.array([0.7, -0.4, 0.2, -0.9, 0.4])
    strengths, found = bradley_terry(planted(given, position))
    assert strengths == pytest.approx(given - given.mean(), abs=1e-7) and found == pytest.approx(position, abs=1e-7)


def test_a_judge_that_always_prefers_the_first_image_finds_no_difference() -> None:
    strengths, position = bradley_terry(np.ones((4, 4)))
    assert strengths == pytest.approx(np.zeros(4), abs=1e-9) and position == pytest.approx(logit(1.0))


def test_ties_have_equal_strengths_and_a_perfect_winner_a_finite_one() -> None:
    tied, position = bradley_terry(np.full((3, 3), 0.5))
    assert tied == pytest.approx(np.zeros(3), abs=1e-12) and position == pytest.approx(0, abs=1e-12)
    preferred = np.full((8, 8), 0.5)
    preferred[0, :], preferred[:, 0] = 1.0, 0.0
    strengths, _ = bradley_terry(preferred)
    assert strengths.argmax() == 0 and 1 < strengths[0] < 10 and np.ptp(strengths[1:]) < 1e-9


def test_images_that_no_choice_connects_with_the_others_have_no_strength() -> None:
    preferred = np.full((5, 5), NAN)
    preferred[0, 1] = preferred[1, 2] = preferred[2, 1] = 0.8
    preferred[3, 4] = 0.9
    strengths, _ = bradley_terry(preferred)
    assert np.isfinite(strengths).tolist() == [True, True, True, False, False]
    for nothing in (np.full((3, 3), NAN), np.full((1, 1), 0.5)):
        strengths, position = bradley_terry(nothing)
        assert np.isnan(strengths).all() and np.isnan(position)


def test_a_ring_of_comparisons_finds_planted_strengths() -> None:
    given = np.linspace(-1, 1, 7)
    preferred = planted(given, 0.5)
    distance = np.abs(np.subtract.outer(np.arange(7), np.arange(7)))
    preferred[np.minimum(distance, 7 - distance) > 1] = NAN
    strengths, position = bradley_terry(preferred)
    assert strengths == pytest.approx(given, abs=1e-7) and position == pytest.approx(0.5, abs=1e-7)

"""Numbers and permutations by address."""

import itertools
from collections import Counter

import numpy as np
import pytest
from brute_force import chi_square_is_plausible
from hypothesis import given
from hypothesis import strategies as st

from cdpo_ray.randomness.numbers import Permutation, mix, random_words, unit_interval


@given(st.integers(1, 3000), st.integers(0, 5))
def test_a_permutation_is_one_to_one(size: int, seed: int) -> None:
    assert sorted(Permutation(size, "test", seed)(np.arange(size)).tolist()) == list(range(size))


def test_a_large_permutation_is_computed_without_a_table() -> None:
    size = 2**61 + 7
    moved = Permutation(size, "test", 0)(np.arange(size - 1000, size))
    assert len(set(moved.tolist())) == 1000 and moved.min() >= 0 and moved.max() < size


def test_small_permutations_are_uniformly_distributed() -> None:
    drawn = Counter(tuple(Permutation(4, "test", seed)(np.arange(4)).tolist()) for seed in range(4800))
    counts = np.array([drawn[order] for order in itertools.permutations(range(4))])
    assert chi_square_is_plausible(counts, np.full(24, 200.0))


def test_the_image_of_a_number_is_uncorrelated_with_it() -> None:
    size = 10_000
    moved = Permutation(size, "test", 1)(np.arange(size))
    assert abs(np.corrcoef(np.arange(size), moved)[0, 1]) < 0.04  # 4 standard deviations
    blocks = np.histogram2d(np.arange(size), moved, bins=10)[0]
    assert chi_square_is_plausible(blocks.ravel()[:81], np.full(81, 100.0))


def test_purpose_and_seed_select_the_permutation() -> None:
    sent = [Permutation(100, *address)(np.arange(100)).tolist() for address in [("a", 0), ("a", 1), ("b", 0), ("a", 0)]]
    assert sent[0] == sent[3] and sent[0] != sent[1] and sent[0] != sent[2]


def test_words_mix_as_split_mix_64_does() -> None:
    """First outputs of the reference implementation of SplitMix64 with seed 1234567."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * golden) % 2**64 for step in range(3)], dtype=np.uint64)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_unit_interval_includes_0_and_excludes_1() -> None:
    ends = unit_interval(np.array([0, 2**64 - 1], dtype=np.uint64))
    assert ends[0] == 0.0 and ends[1] == pytest.approx(1, abs=1e-15) and ends[1] < 1


def test_a_longer_stream_has_the_same_beginning() -> None:
    assert random_words("a", 1, 2, 10).tolist() == random_words("a", 1, 2, 25).tolist()[:10]

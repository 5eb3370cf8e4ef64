"""Pairs -> random draws."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.pairs import PairArrays, PairSet
from cdpo_ray.randomness.numbers import random_words, unit_interval

MAX_ATTEMPTS = 10_000

Accept = Callable[[PairArrays, NDArray[np.uint64]], NDArray[np.bool_]]
"""Accepted pairs, given one random word per pair; rejection sampling with a probability per pair."""


def draw_pairs(admitted: PairSet, num_draws: int, *, seed: int, stage: int, accept: Accept | None = None) -> PairArrays:
    """Draw admitted pairs with replacement: uniformly, or in proportion to their acceptance probability.

    Draw ``n`` is a function of the admitted pairs, ``seed``, ``stage`` and ``n``: a longer sequence starts with the
    same pairs. It is a 64-bit number modulo ``num_pairs``, which changes a pair's probability by a relative error below
    2^-39 for up to 33 million pairs.

    Args:
        admitted: pairs of the stage.
        num_draws: number of draws, >= 0.
        seed, stage: address of the random stream.
        accept: accepts draws; a rejected one is repeated from the stream of the next attempt. `None`: uniform draws.

    Raises:
        ValueError: if no pair is admitted, ``num_draws`` is negative, or almost no pair is accepted.
    """
    if num_draws < 0:
        raise ValueError(f"`num_draws` must be >= 0, got {num_draws}")
    if admitted.num_pairs == 0:
        raise ValueError(f"stage {stage} has no pair to draw from")
    if accept is None:
        return admitted.at(_numbers("pairs", seed, stage, num_draws, admitted.num_pairs))
    drawn, pending = np.empty(num_draws, dtype=np.int64), np.arange(num_draws)
    for attempt in range(MAX_ATTEMPTS):
        if not len(pending):
            return admitted.at(drawn)
        num_words = int(pending[-1]) + 1
        drawn[pending] = _numbers(f"pairs {attempt}", seed, stage, num_words, admitted.num_pairs)[pending]
        words = random_words(f"accept {attempt}", seed, stage, num_words)[pending]
        pending = pending[~accept(admitted.at(drawn[pending]), words)]
    raise ValueError(
        f"stage {stage}: {len(pending)} of {num_draws} weighted draws found no pair in {MAX_ATTEMPTS} attempts, because"
        " a few pairs have almost all the weight; check for outlying scores, or draw uniformly"
    )


def swap_labels(pairs: PairArrays, probability: float, *, seed: int, stage: int) -> PairArrays:
    """Swap chosen and rejected of each pair with a probability; 0.5 is the control experiment with random labels.

    Whether a pair is swapped is a function of ``seed``, ``stage`` and its ``draw``. ``rank_gap`` and ``score_gap`` do
    not change and stay positive.

    Args:
        probability: of a swap, 0 to 1.
        seed, stage: address of the random stream.

    Raises:
        ValueError: if ``probability`` is outside 0..1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"`probability` must be in 0..1, got {probability}")
    words = random_words("swap", seed, stage, int(pairs.draw.max(initial=-1)) + 1)[pairs.draw]
    swap = unit_interval(words) < probability
    chosen, rejected = np.where(swap, (pairs.rejected, pairs.chosen), (pairs.chosen, pairs.rejected))
    return replace(pairs, chosen=chosen, rejected=rejected)


def sort_by_difficulty(pairs: PairArrays) -> PairArrays:
    """Sort pairs from easy to hard: by rank gap, largest first, then by draw."""
    return pairs.take(np.lexsort((pairs.draw, -pairs.rank_gap)))


def _numbers(purpose: str, seed: int, stage: int, num_draws: int, num_pairs: int) -> NDArray[np.int64]:
    return (random_words(purpose, seed, stage, num_draws) % np.uint64(num_pairs)).astype(np.int64)

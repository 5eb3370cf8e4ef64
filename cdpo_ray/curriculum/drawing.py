"""Pairs -> draws."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.pairs import PairBatch, PairSet
from cdpo_ray.randomness.numbers import random_words, unit_interval

MAX_ATTEMPTS = 10_000

Accept = Callable[[PairBatch, NDArray[np.uint64]], NDArray[np.bool_]]
"""Which pairs to keep, given a random word each; keeping with a probability makes draws that follow it."""


def draw_pairs(admitted: PairSet, num_draws: int, *, seed: int, stage: int, accept: Accept | None = None) -> PairBatch:
    """Draw pairs from all that are admitted, with replacement: uniformly, or in proportion to their acceptance.

    Draw ``n`` is a function of the admitted pairs, ``seed``, ``stage`` and ``n``: a longer draw starts with the same
    pairs. It is a 64-bit number modulo ``num_pairs``, which moves a pair's probability by less than 2^-39 of itself up
    to 33 million pairs.

    Args:
        admitted: the pairs of the stage.
        num_draws: >= 0.
        seed, stage: address of the random stream.
        accept: a draw that is not accepted is drawn again, from the stream of the next attempt.

    Raises:
        ValueError: if no pair is admitted, ``num_draws`` is negative, or next to no pair is accepted.
    """
    if num_draws < 0:
        raise ValueError(f"`num_draws` must be >= 0, got {num_draws}")
    if admitted.num_pairs == 0:
        raise ValueError(f"stage {stage} has no pair to draw from")
    if accept is None:
        return admitted.at(_numbers("pairs", seed, stage, num_draws, admitted.num_pairs))
    drawn, waiting = np.empty(num_draws, dtype=np.int64), np.arange(num_draws)
    for attempt in range(MAX_ATTEMPTS):
        if not len(waiting):
            return admitted.at(drawn)
        num_words = int(waiting[-1]) + 1
        drawn[waiting] = _numbers(f"pairs {attempt}", seed, stage, num_words, admitted.num_pairs)[waiting]
        words = random_words(f"accept {attempt}", seed, stage, num_words)[waiting]
        waiting = waiting[~accept(admitted.at(drawn[waiting]), words)]
    raise ValueError(
        f"stage {stage}: {len(waiting)} of {num_draws} weighted draws found no pair in {MAX_ATTEMPTS} attempts, as few"
        " pairs hold nearly all the weight; look for outlying scores, or draw uniformly"
    )


def swap_labels(pairs: PairBatch, probability: float, *, seed: int, stage: int) -> PairBatch:
    """Swap chosen and rejected of each pair with a probability: the control experiment with random labels at 0.5.

    Whether a pair is swapped is a function of ``seed``, ``stage`` and its ``draw``. ``rank_gap`` and ``score_gap`` stay
    as they were, positive: they tell how far apart the two are, whichever is called chosen.

    Raises:
        ValueError: if ``probability`` is outside 0..1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"`probability` must be in 0..1, got {probability}")
    words = random_words("swap", seed, stage, int(pairs.draw.max(initial=-1)) + 1)[pairs.draw]
    swap = unit_interval(words) < probability
    chosen, rejected = np.where(swap, (pairs.rejected, pairs.chosen), (pairs.chosen, pairs.rejected))
    return replace(pairs, chosen=chosen, rejected=rejected)


def sort_by_difficulty(pairs: PairBatch) -> PairBatch:
    """The pairs from easy to hard: by rank gap, largest first, then by draw."""
    return pairs.take(np.lexsort((pairs.draw, -pairs.rank_gap)))


def _numbers(purpose: str, seed: int, stage: int, num_draws: int, num_pairs: int) -> NDArray[np.int64]:
    return (random_words(purpose, seed, stage, num_draws) % np.uint64(num_pairs)).astype(np.int64)

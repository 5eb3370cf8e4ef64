"""Ranking -> pairs, addressed by number instead of stored."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cdpo_ray.curriculum.ranking import Ranking
from cdpo_ray.randomness.numbers import Permutation, mix, random_words

CHUNK_PAIRS = 2**18
"""Number of pairs per chunk when all pairs are visited; a chunk fits the processor's cache."""


@dataclass(frozen=True)
class PairArrays:
    """Pairs of samples, one array per column.

    Attributes:
        prompt: ``[pair]`` int64, row of the prompt in the score table.
        chosen, rejected: ``[pair]`` int64, sample index within the prompt.
        rank_gap: ``[pair]`` int64, difference of the ranks, >= 1; large is easy.
        score_gap: ``[pair]`` float64, higher minus lower score, > 0, in the reward's unit.
        draw: ``[pair]`` int64, number of the draw.
    """

    prompt: NDArray[np.int64]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]
    rank_gap: NDArray[np.int64]
    score_gap: NDArray[np.float64]
    draw: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.draw)

    def take(self, index: NDArray[np.integer]) -> Self:
        """Pairs at these indices, in this order."""
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def identity(self, num_samples: int) -> NDArray[np.int64]:
        """Number of each pair of samples, ``[pair]`` int64; it does not change if chosen and rejected are swapped."""
        one, other = np.minimum(self.chosen, self.rejected), np.maximum(self.chosen, self.rejected)
        return (self.prompt * num_samples + one) * num_samples + other


def concat(batches: Sequence[PairArrays]) -> PairArrays:
    """Concatenate at least one batch of pairs."""
    return PairArrays(
        *(np.concatenate([getattr(batch, field.name) for batch in batches]) for field in fields(PairArrays))
    )


@dataclass(frozen=True)
class Extent:
    """Counts and bounds of a set of pairs; the bounds are 0 if it is empty.

    Attributes:
        pairs_per_prompt: ``[prompt]`` int64.
        min_rank_gap, max_rank_gap: bounds of the rank gap.
        min_score_gap, max_score_gap: bounds of the score gap, in the reward's unit.
    """

    pairs_per_prompt: NDArray[np.int64]
    min_rank_gap: int
    max_rank_gap: int
    min_score_gap: float
    max_score_gap: float


class PairSet(ABC):
    """Pairs of a ranking, numbered 0 to ``num_pairs - 1``."""

    ranking: Ranking
    num_pairs: int

    @abstractmethod
    def _at(self, index: NDArray[np.integer]) -> PairArrays:
        """Pairs with these numbers, unchecked."""

    def at(self, index: NDArray[np.integer]) -> PairArrays:
        """Pairs with these numbers; ``draw`` counts them from 0.

        Args:
            index: ``[pair]``, numbers of pairs.

        Raises:
            ValueError: if a number is outside ``0 .. num_pairs - 1``.
        """
        if len(index) and not 0 <= index.min() <= index.max() < self.num_pairs:
            raise ValueError(f"`index` must be in 0..{self.num_pairs - 1}, got {index.min()}..{index.max()}")
        return self._at(index)

    def all(self) -> PairArrays:
        """All pairs in the order of their numbers; O(pairs) memory, for small sets."""
        return self._at(np.arange(self.num_pairs))

    def chunks(self) -> Iterator[tuple[NDArray[np.int64], PairArrays]]:
        """Yield numbers and pairs of the whole set, `CHUNK_PAIRS` at a time."""
        for start in range(0, self.num_pairs, CHUNK_PAIRS):
            numbers = np.arange(start, min(start + CHUNK_PAIRS, self.num_pairs))
            yield numbers, self._at(numbers)

    @cached_property
    def extent(self) -> Extent:
        """Counts and bounds of the set."""
        num_prompts = len(self.ranking.order)
        counts = np.zeros(num_prompts, dtype=np.int64)
        rank_gaps, score_gaps = [], []
        for _, pairs in self.chunks():
            counts += np.bincount(pairs.prompt, minlength=num_prompts)
            rank_gaps += [pairs.rank_gap.min(), pairs.rank_gap.max()]
            score_gaps += [pairs.score_gap.min(), pairs.score_gap.max()]
        return _extent(counts, np.array(rank_gaps), np.array(score_gaps))

    @property
    def pairs_per_prompt(self) -> NDArray[np.int64]:
        """Number of pairs of each prompt, ``[prompt]`` int64."""
        return self.extent.pairs_per_prompt

    @property
    def num_prompts(self) -> int:
        """Number of prompts with at least one pair."""
        return int(np.count_nonzero(self.pairs_per_prompt))


class AdmittedPairs(PairSet):
    """All pairs within bounds, ordered by prompt and chosen rank.

    Scores decrease along the ranks, so the admitted rejected ranks of a chosen rank form one contiguous range. Its
    start and a running count per chosen rank find any pair by its number: memory is O(prompt x sample).

    Args:
        ranking: ranking of the samples of each prompt.
        min_gap, max_gap: bounds of the rank gap, inclusive; one value or ``[prompt]``. An empty interval admits no
            pair.
        min_score_gap, max_score_gap: a pair is admitted if ``min_score_gap < score(chosen) - score(rejected) <=
            max_score_gap`` in float64, so equal scores never form a pair; in the reward's unit, >= 0.

    Raises:
        ValueError: if ``min_gap`` is below 1 or ``min_score_gap`` is negative.
    """

    def __init__(
        self,
        ranking: Ranking,
        min_gap: ArrayLike = 1,
        max_gap: ArrayLike | None = None,
        *,
        min_score_gap: float = 0.0,
        max_score_gap: float = np.inf,
    ) -> None:
        num_prompts, num_samples = ranking.order.shape
        max_gap = num_samples - 1 if max_gap is None else max_gap
        min_gaps, max_gaps = (np.broadcast_to(gap, num_prompts)[:, None] for gap in (min_gap, max_gap))
        if np.any(min_gaps < 1):
            raise ValueError(f"`min_gap` must be >= 1, got {min_gaps.min()}")
        if not min_score_gap >= 0:
            raise ValueError(f"`min_score_gap` must be >= 0, got {min_score_gap}")
        ranks = np.arange(num_samples)
        first = np.maximum(ranks + min_gaps, _first_below(ranking, min_score_gap))
        last = np.minimum(ranks + max_gaps, ranking.num_ranked[:, None] - 1)
        if np.isfinite(max_score_gap):
            last = np.minimum(last, _first_below(ranking, max_score_gap) - 1)
        self.ranking = ranking
        self._first_rejected = first.ravel()
        self._starts = np.concatenate([[0], np.cumsum(np.maximum(last - first + 1, 0))])  # [prompt * sample + 1]
        self.num_pairs = int(self._starts[-1])

    def _at(self, index: NDArray[np.integer]) -> PairArrays:
        slot = np.searchsorted(self._starts, index, side="right") - 1
        prompt, rank_w = np.divmod(slot, self.ranking.num_samples)
        rank_l = self._first_rejected[slot] + index - self._starts[slot]
        order, scores = self.ranking.order, self.ranking.sorted_scores
        return PairArrays(
            prompt=prompt,
            chosen=order[prompt, rank_w].astype(np.int64),
            rejected=order[prompt, rank_l].astype(np.int64),
            rank_gap=rank_l - rank_w,
            score_gap=scores[prompt, rank_w] - scores[prompt, rank_l],
            draw=np.arange(len(index)),
        )

    @cached_property
    def extent(self) -> Extent:
        """Counts and bounds of the set, from the first and last rejected rank of each chosen rank."""
        starts = self._starts
        some = np.flatnonzero(np.diff(starts))
        ends = self._at(np.concatenate([starts[some], starts[some + 1] - 1]))
        return _extent(np.diff(starts[:: self.ranking.num_samples]), ends.rank_gap, ends.score_gap)


class ListedPairs(PairSet):
    """Subset of another set; memory is O(size of the subset).

    Args:
        pairs: the other set.
        numbers: ``[pair]`` int64, distinct numbers in that set.
    """

    def __init__(self, pairs: PairSet, numbers: NDArray[np.int64]) -> None:
        self.ranking, self.num_pairs = pairs.ranking, len(numbers)
        self._pairs, self._numbers = pairs, numbers

    def _at(self, index: NDArray[np.integer]) -> PairArrays:
        return self._pairs.at(self._numbers[index])


class ShuffledSlice(PairSet):
    """Elements ``first .. end - 1`` of another set in shuffled order; memory is O(1).

    Args:
        pairs: the other set; all slices share one shuffle.
        first, end: bounds of the slice, ``0 <= first <= end <= pairs.num_pairs``.
        seed: address of the shuffle.
    """

    def __init__(self, pairs: PairSet, first: int, end: int, *, seed: int) -> None:
        self.ranking, self.num_pairs = pairs.ranking, end - first
        self._pairs, self._first = pairs, first
        self._shuffle = Permutation(pairs.num_pairs, "deal", seed)

    def _at(self, index: NDArray[np.integer]) -> PairArrays:
        return self._pairs.at(self._shuffle(self._first + index))


def cap_per_prompt(pairs: PairSet, max_pairs: int, *, seed: int, stage: int) -> PairSet:
    """Random subset of at most ``max_pairs`` per prompt; memory is O(prompt x max_pairs), time O(pairs).

    Each pair has a random key, a function of the pair, ``seed`` and ``stage``; a prompt keeps those with the smallest.

    Args:
        max_pairs: maximum number of pairs per prompt, >= 1.
    """
    (key,) = random_words("cap", seed, stage, 1)
    kept = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    for numbers, chunk in pairs.chunks():
        keys = mix(chunk.identity(pairs.ranking.num_samples).astype(np.uint64) ^ key)
        joined = zip(kept, (numbers, keys, chunk.prompt), strict=True)
        numbers, keys, prompts = (np.concatenate(columns) for columns in joined)
        order = np.lexsort((keys, prompts))
        in_order = prompts[order]
        position = np.arange(len(order)) - np.searchsorted(in_order, in_order)
        order = order[position < max_pairs]
        kept = numbers[order], keys[order], prompts[order]
    return ListedPairs(pairs, np.sort(kept[0]))


def _extent(
    pairs_per_prompt: NDArray[np.int64], rank_gaps: NDArray[np.int64], score_gaps: NDArray[np.float64]
) -> Extent:
    if not len(rank_gaps):
        return Extent(pairs_per_prompt, 0, 0, 0.0, 0.0)
    return Extent(
        pairs_per_prompt, int(rank_gaps.min()), int(rank_gaps.max()), float(score_gaps.min()), float(score_gaps.max())
    )


def _first_below(ranking: Ranking, min_score_gap: float) -> NDArray[np.int64]:
    """For each rank ``i`` the first rank ``j`` with ``s[i] - s[j] > min_score_gap``, or the end: ``[prompt, sample]``.

    Bisection of all ranks at once. It evaluates the same difference that defines a pair, so rounding is consistent.
    """
    scores, num_samples = ranking.sorted_scores, ranking.num_samples
    high = np.repeat(ranking.num_ranked[:, None], num_samples, axis=1)
    low = np.zeros_like(high)
    for _ in range(num_samples.bit_length()):
        middle = (low + high) // 2
        below = scores - np.take_along_axis(scores, np.minimum(middle, num_samples - 1), axis=1) > min_score_gap
        low = np.where(below, low, np.minimum(middle + 1, high))
        high = np.where(below, middle, high)
    return high

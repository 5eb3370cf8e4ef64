"""Seeds, random numbers and permutations by address, without torch."""

import math
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6


def key_of(*address: int | str) -> int:
    """128-bit key of an address such as ``(run seed, "image", prompt, index)``; the same on every machine."""
    return int.from_bytes(_digest(address, num_bytes=16))


def seed_of(*address: int | str) -> int:
    """63-bit seed of an address, for interfaces that take no wider one; see `key_of`."""
    return int.from_bytes(_digest(address, num_bytes=8)) >> 1


def random_words(purpose: str, seed: int, stage: int, num_words: int) -> NDArray[np.uint64]:
    """First 64-bit numbers, ``[word]``, of the random stream at the address (purpose, seed, stage)."""
    key = blake2b(f"{purpose}/{seed}/{stage}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "little")).random_raw(num_words)


def unit_interval(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map 64-bit words to numbers in ``[0, 1)``, elementwise."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Pseudorandom bijection of 64-bit numbers, elementwise: the finalizer of SplitMix64."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Permutation:
    """Random permutation of ``0 .. size - 1`` that is computed, not stored.

    A Feistel network on the smallest square of at least ``size`` numbers, with cycle walking: it is applied again to
    numbers outside the range, which keeps the map one-to-one.

    Args:
        size: number of elements, 0 to 2^62.
        purpose, seed: address of the permutation.
    """

    def __init__(self, size: int, purpose: str, seed: int) -> None:
        self.size = size
        self._side = np.uint64(math.isqrt(max(size - 1, 0)) + 1)
        self._keys = random_words(purpose, seed, 0, NUM_ROUNDS)

    def __call__(self, index: NDArray[np.integer]) -> NDArray[np.int64]:
        """Images of numbers in ``0 .. size - 1`` under the permutation, elementwise."""
        moved = self._step(index.astype(np.uint64))
        while len(outside := np.flatnonzero(moved >= self.size)):
            moved[outside] = self._step(moved[outside])
        return moved.astype(np.int64)

    def _step(self, words: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(words, self._side)
        for key in self._keys:
            left, right = right, (left + mix(right ^ key) % self._side) % self._side
        return left * self._side + right


def _digest(address: tuple[int | str, ...], *, num_bytes: int) -> bytes:
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in address)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=num_bytes).digest()

"""Random numbers depend on their address only."""

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import torch

from cdpo_ray.randomness.noise import generator_at, noise_at
from cdpo_ray.randomness.numbers import key_of, seed_of

PROMPTS = ["a cat", "a cat ", "A cat", "", "0", "1", "a 🦊", "nul\x00", "lone \ud800", "x" * 10_000]


def test_different_addresses_have_different_seeds() -> None:
    addresses = list(itertools.product((0, 1, 2**62), ("image", "training"), PROMPTS, (0, 1, 10, 500)))
    assert len({seed_of(*address) for address in addresses}) == len(addresses)


def test_a_number_and_its_text_are_different_addresses() -> None:
    assert seed_of(0, "image", "1") != seed_of(0, "image", 1)


def test_parts_of_an_address_are_separated() -> None:
    assert len({seed_of("ab", "c"), seed_of("a", "bc"), seed_of("abc"), seed_of("abc", "")}) == 4


def test_a_seed_is_the_blake2b_of_the_typed_address() -> None:
    text = b"int:7\x1fstr:image\x1fstr:a cat\x1fint:3"
    expected = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    assert seed_of(7, "image", "a cat", 3) == expected
    assert 0 <= expected < 2**63


def test_a_key_is_the_128_bit_blake2b_of_the_typed_address() -> None:
    text = b"int:7\x1fstr:image\x1fstr:a cat\x1fint:3"
    assert key_of(7, "image", "a cat", 3) == int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "big")


def test_a_generator_is_the_mersenne_twister_whose_state_is_the_philox_stream_of_the_key() -> None:
    words = np.random.Philox(key=key_of(7, "image", "a cat", 3)).random_raw(624) >> np.uint64(32)
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words.astype(np.uint32), "pos": 624}}
    drawn = torch.randint(2**20, (2000,), generator=generator_at(7, "image", "a cat", 3))
    assert drawn.tolist() == (twister.random_raw(2000) % 2**20).tolist()


def test_addresses_whose_seeds_agree_in_32_bits_have_different_noise() -> None:
    first_index: dict[int, int] = {}
    for index in itertools.count():
        low_bits = seed_of(0, "image", "x", index) % 2**32
        if low_bits in first_index:
            break
        first_index[low_bits] = index
    other = first_index[low_bits]
    seeded = [torch.Generator().manual_seed(seed_of(0, "image", "x", at)) for at in (index, other)]
    assert torch.equal(*(torch.randn(8, generator=generator) for generator in seeded))  # torch keeps 32 bits
    assert not torch.equal(noise_at((8,), 0, "image", "x", index), noise_at((8,), 0, "image", "x", other))


def test_the_noise_is_the_same_in_a_process_with_another_hash_seed() -> None:
    code = (
        "from cdpo_ray.randomness.noise import noise_at; print(noise_at((5,), 7, 'image', 'a \U0001f98a', 3).tolist())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.strip() == str(noise_at((5,), 7, "image", "a 🦊", 3).tolist())


def test_other_draws_do_not_change_the_noise() -> None:
    first = noise_at((3, 4), 1, "image", "x", 0)
    torch.manual_seed(99)
    torch.randn(100)
    noise_at((7,), 1, "image", "y", 0)
    assert torch.equal(noise_at((3, 4), 1, "image", "x", 0), first)


def test_drawing_at_an_address_does_not_advance_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    noise_at((1000,), 1, "image", "x", 0)
    assert torch.equal(torch.randn(4), expected)


def test_the_noise_of_many_addresses_is_standard_normal_and_uncorrelated() -> None:
    noise = torch.stack([noise_at((4, 8, 8), 0, "image", "x", index) for index in range(256)]).flatten(1).double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    correlation = torch.corrcoef(noise) - torch.eye(256, dtype=torch.float64)
    assert correlation.abs().max() < 6 / noise.shape[1] ** 0.5


def test_a_generator_at_an_address_starts_with_its_noise() -> None:
    assert torch.equal(torch.randn(6, generator=generator_at(0, "a")), noise_at((6,), 0, "a"))

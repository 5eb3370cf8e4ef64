"""Copies of trainable weights: moving average, checkpoint tensors, and use in place of the weights."""

import contextlib

import torch
from torch import nn

from cdpo_ray.training.weight_copy import WeightCopy, averaging_share


def parameters(value: float = 0.0) -> dict[str, nn.Parameter]:
    return {"up": nn.Parameter(torch.full((3,), value)), "down": nn.Parameter(torch.full((2, 2), 2 * value))}


def averaged(values: list[float], decay: float) -> torch.Tensor:
    trained = parameters(9.0)  # before training: must not count
    copy = WeightCopy("average", trained)
    for number, value in enumerate(values, start=1):
        with torch.no_grad():
            trained["up"].fill_(value)
        copy.approach(averaging_share(number, decay))
    return copy.values["up"]


def test_the_first_weights_are_averaged_equally() -> None:
    values = [1.0, 4.0, -2.0, 3.0]
    torch.testing.assert_close(averaged(values, 0.9), torch.full((3,), 1.5))


def test_after_that_the_average_is_exponential() -> None:
    values, decay = [1.0, 4.0, -2.0, 3.0, 8.0], 0.5
    expected = (1.0 + 4.0) / 2  # 1 / (1 - decay) = 2 equal weights
    for value in values[2:]:
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(averaged(values, decay), torch.full((3,), expected))


def test_the_copy_is_used_within_the_context_only_even_after_an_error() -> None:
    trained = parameters(1.0)
    copy = WeightCopy("healthy", trained)
    with torch.no_grad():
        trained["up"].fill_(5.0)
    with contextlib.suppress(KeyboardInterrupt), copy.applied():
        assert trained["up"].tolist() == [1.0] * 3
        raise KeyboardInterrupt
    assert trained["up"].tolist() == [5.0] * 3 and trained["up"].requires_grad
    copy.approach(1.0)
    assert copy.values["up"].tolist() == [5.0] * 3


def test_a_copy_of_16_bit_weights_is_kept_in_32_bits() -> None:
    trained = {"up": nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    copy = WeightCopy("average", trained)
    with torch.no_grad():
        trained["up"].fill_(2.0)
    copy.approach(1e-3)  # below the resolution of bf16
    torch.testing.assert_close(copy.values["up"], torch.full((3,), 1.001))
    with copy.applied():
        assert trained["up"].dtype == torch.bfloat16


def test_tensors_restore_a_copy_exactly() -> None:
    first, second = WeightCopy("average", parameters(0.1)), WeightCopy("average", parameters(7.0))
    first.approach(0.3)
    saved = dict(first.tensors())
    assert set(saved) == {"average.up", "average.down"}
    second.restore(saved.__getitem__)
    assert all(torch.equal(first.values[name], second.values[name]) for name in first.values)

"""8-bit AdamW: close to AdamW, a quarter of its state, skipped on request, saved and restored exactly."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_policies import training_section
from torch import Tensor, nn

from cdpo_ray.config.training import TrainingSection
from cdpo_ray.errors import TrainingError
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.training.adamw import Skipping, make_optimizer
from cdpo_ray.training.engine import restore_training, start_engine, training_tensors

WIDTH = 128  # 16,384 values per matrix; below 4,096 moments stay fp32


def section(optimizer: str = "adamw_8bit") -> TrainingSection:
    return training_section(optimizer=optimizer, learning_rate=1e-2, max_grad_norm=1e9)


class Regression(nn.Module):
    """``inputs -> targets`` of a fixed linear map, by a linear layer (8-bit moments) and a bias (fp32 moments)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.copy_(0.1 * noise_at((WIDTH, WIDTH), 0, "start"))
            self.layer.bias.zero_()

    def forward(self, step: int) -> Tensor:
        inputs = noise_at((64, WIDTH), step, "inputs")
        targets = inputs @ (0.1 * noise_at((WIDTH, WIDTH), 0, "truth"))
        dtype = self.layer.weight.dtype
        return (self.layer(inputs.to(dtype)).float() - targets).square().mean()


def trained(optimizer: str, num_steps: int) -> tuple[Regression, Skipping, float]:
    net = Regression()
    stepped = make_optimizer(list(net.parameters()), section(optimizer))
    for step in range(num_steps):
        loss = net(step)
        loss.backward()
        stepped.step()
        net.zero_grad()
    with torch.no_grad():
        return net, stepped, float(net(10_000))


def test_it_converges_to_adamws_weights() -> None:
    """arXiv:2110.02861, table 1: 8-bit Adam ends where 32-bit Adam ends; here within 2 % of the way."""
    (exact, _, exact_loss), (rounded, _, rounded_loss) = trained("adamw", 100), trained("adamw_8bit", 100)
    start = Regression()
    with torch.no_grad():
        first_loss = float(start(10_000))
    way = exact.layer.weight - start.layer.weight
    assert exact_loss < 0.2 * first_loss
    assert abs(rounded_loss - exact_loss) < 0.02 * first_loss
    assert 0 < float((rounded.layer.weight - exact.layer.weight).norm() / way.norm()) < 0.1


def test_its_state_takes_a_quarter_of_the_memory() -> None:
    def state_bytes(optimizer: str) -> int:
        net, stepped, _ = trained(optimizer, 1)
        return sum(value.nbytes for value in stepped.saved_tensors(net.layer.weight).values())

    num_values = WIDTH * WIDTH
    assert state_bytes("adamw") == 8 * num_values
    assert state_bytes("adamw_8bit") == 2 * num_values + 2 * 4 * num_values // 256


def test_a_skipped_step_changes_neither_weights_nor_moments() -> None:
    net, stepped, _ = trained("adamw_8bit", 3)
    weight = net.layer.weight.detach().clone()
    state = {name: value.clone() for name, value in stepped.saved_tensors(net.layer.weight).items()}
    net(3).backward()
    stepped.skips = True
    stepped.step()
    assert stepped.num_steps == 3 and torch.equal(net.layer.weight, weight)
    assert all(torch.equal(value, state[name]) for name, value in stepped.saved_tensors(net.layer.weight).items())
    stepped.skips = False
    stepped.step()
    assert stepped.num_steps == 4 and not torch.equal(net.layer.weight, weight)


def test_it_steps_as_bitsandbytes_does_without_waiting_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.optim import adamw, optimizer

    waits: list[Tensor] = []
    monkeypatch.setattr(optimizer, "sync_gpu", waits.append)

    def stepped(make: Callable[[list[nn.Parameter]], Any]) -> list[Tensor]:
        net = Regression()
        stepping = make(list(net.parameters()))
        for step in range(3):
            net.zero_grad()
            net(step).backward()
            stepping.step()
        state = stepping.state[net.layer.weight]
        return [net.layer.weight, net.layer.bias, *(state[name] for name in ("state1", "state2", "absmax1", "absmax2"))]

    found = stepped(lambda parameters: make_optimizer(parameters, section()))
    assert not waits
    expected = stepped(lambda parameters: adamw.AdamW8bit(parameters, lr=1e-2, weight_decay=1e-4))
    assert len(waits) == 3 * 2, "bitsandbytes waits after each tensor of each step"
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


def resumed(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """An engine stepped six times, and another restored after three of them; their tensors at each point."""

    def start() -> Any:
        net = Regression(dtype)
        return start_engine(net, list(net.parameters()), section(), num_workers=1)

    def step(engine: Any, numbers: range) -> None:
        for number in numbers:
            engine.backward(engine(number))
            engine.step()

    def state(engine: Any) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in training_tensors(engine)}

    whole = start()
    found = [state(whole)]
    step(whole, range(3))
    found.append(state(whole))
    step(whole, range(3, 6))
    found.append(state(whole))
    other = start()
    restore_training(other, found[1].__getitem__)
    found.append(state(other))
    step(other, range(3, 6))
    found.append(state(other))
    return found


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_restored_from_its_tensors_continues_bit_for_bit(dtype: torch.dtype) -> None:
    start, middle, end, restored, resumed_end = resumed(dtype)
    assert (float(start["step"]), float(middle["step"]), float(end["step"])) == (0, 3, 6)
    assert middle["state1.layer.weight"].dtype == torch.uint8 and middle["state1.layer.bias"].dtype == torch.float32
    assert not torch.equal(middle["state1.layer.weight"], end["state1.layer.weight"])
    for expected, found in ((middle, restored), (end, resumed_end)):
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cdpo_ray.training.adamw_8bit", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    with pytest.raises(TrainingError, match=r'adamw_8bit needs bitsandbytes.*"cdpo_ray\[lowmem\]"'):
        make_optimizer([nn.Parameter(torch.zeros(1))], section())

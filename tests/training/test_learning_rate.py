"""The learning rate of each update against PyTorch's schedulers."""

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from cdpo_ray.config.training import ScheduleSection
from cdpo_ray.training.learning_rate import learning_rate_at

NUM_UPDATES, PEAK = 40, 3e-4


def rates(schedule: ScheduleSection) -> list[float]:
    return [
        learning_rate_at(update, peak=PEAK, num_updates=NUM_UPDATES, **schedule.model_dump())
        for update in range(1, NUM_UPDATES + 1)
    ]


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_updates", [0, 1, 7])
def test_the_learning_rate_is_that_of_pytorchs_schedulers(warmup_updates: int, decay: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    after = (
        CosineAnnealingLR(optimizer, NUM_UPDATES - warmup_updates)
        if decay == "cosine"
        else ConstantLR(optimizer, factor=1)
    )
    scheduler: torch.optim.lr_scheduler.LRScheduler = after
    if warmup_updates:
        warm_up = LinearLR(optimizer, start_factor=1 / warmup_updates, total_iters=max(1, warmup_updates - 1))
        scheduler = SequentialLR(optimizer, [warm_up, after], milestones=[warmup_updates])
    expected = []
    for _ in range(NUM_UPDATES):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    schedule = ScheduleSection(warmup_updates=warmup_updates, decay=decay)  # type: ignore[arg-type]
    assert rates(schedule) == pytest.approx(expected, rel=1e-9)


def test_every_update_of_a_run_learns_even_if_it_is_shorter_than_its_warm_up() -> None:
    for schedule in (ScheduleSection(decay="cosine"), ScheduleSection(warmup_updates=3 * NUM_UPDATES)):
        assert min(rates(schedule)) > 0


def test_without_warm_up_the_learning_rate_is_constant_as_published() -> None:
    assert set(rates(ScheduleSection(warmup_updates=0))) == {PEAK}

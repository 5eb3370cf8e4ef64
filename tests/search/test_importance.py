"""Importance of knobs: only effects that exceed chance are reported."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from cdpo_ray.search.importance import _explained, _features, _ranks, importance
from cdpo_ray.search.proposals import propose
from cdpo_ray.search.space import Knob, Space
from cdpo_ray.search.trials import DONE, FAILED, RUNNING, STOPPED, Point, Trial

PACING = Knob("curriculum.pacing", ("cumulative", "sliding_window"))
SPACE: Space = (
    Knob("training.beta", low=50.0, high=1000.0, log=True),
    PACING,
    Knob("curriculum.window", (1, 2, 3), when={PACING.key: ["sliding_window"]}),
    Knob("curriculum.num_stages", (1, 2, 4, 6)),
)


def trials(value: Callable[[Point], float], num: int, *, seed: int = 0) -> list[Trial]:
    """Random trials, with noise added to their value."""
    noise = np.random.default_rng(seed).normal(size=num) * 0.1
    found = []
    for number in range(2, num + 2):
        point = propose(SPACE, "random", ["reward"], number, found, seed, lambda point: True).point
        assert point is not None
        found.append(Trial(number, point, DONE, ({"stage": 1, "reward": value(point) + noise[number - 2]},)))
    return found


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("training.beta", lambda point: math.log(point["training.beta"])),
        ("training.beta", lambda point: -((math.log(point["training.beta"] / 223)) ** 2)),
        ("curriculum.pacing", lambda point: float(point["curriculum.pacing"] == "cumulative")),
        ("curriculum.num_stages", lambda point: float(point["curriculum.num_stages"] in (2, 4))),
    ],
)
def test_the_only_knob_with_an_effect_has_most_of_the_importance(key: str, value: Callable[[Point], float]) -> None:
    shares = [importance(SPACE, trials(value, 16, seed=seed), "reward") for seed in range(10)]
    assert all(found and sum(found.values()) == pytest.approx(1) for found in shares)
    assert all(max(found, key=found.__getitem__) == key for found in shares if found)
    assert np.mean([found[key] for found in shares if found]) > 0.75


def test_without_effects_a_knob_seldom_has_importance() -> None:
    """A knob passes in one of twenty searches: a binomial of 100 searches and 4 knobs."""
    found = [importance(SPACE, trials(lambda point: 0.0, 12, seed=seed), "reward") for seed in range(100)]
    assert all(shares is not None and [*shares] == [knob.key for knob in SPACE] for shares in found)
    by_knob = [sum(shares[knob.key] > 0 for shares in found if shares) for knob in SPACE]
    assert max(by_knob) <= 12 and 5 <= sum(by_knob) <= 35
    assert {sum(shares.values()) for shares in found if shares and not any(shares.values())} == {0.0}


def test_a_conditional_knob_does_not_take_the_importance_of_its_condition() -> None:
    def by_pacing(point: Point) -> float:
        return float(point[PACING.key] == "sliding_window")

    def by_window(point: Point) -> float:
        return float(point.get("curriculum.window", 2)) - 2

    shares = [importance(SPACE, trials(by_pacing, 20, seed=seed), "reward") for seed in range(10)]
    assert all(found and found["curriculum.window"] < 0.2 < found[PACING.key] for found in shares)
    shares = [importance(SPACE, trials(by_window, 20, seed=seed), "reward") for seed in range(10)]
    assert np.mean([found["curriculum.window"] for found in shares if found]) > 0.6


def test_explained_variance_is_between_choices_or_along_a_parabola() -> None:
    rng = np.random.default_rng(0)
    ranks = _ranks(rng.normal(size=(30)))
    windows, betas = rng.integers(3, size=30), rng.uniform(50, 1000, size=30)
    found = [Trial(i, {"w": int(w), "b": float(b)}) for i, (w, b) in enumerate(zip(windows, betas, strict=True))]
    groups = [ranks[windows == window] for window in range(3)]
    between = sum(len(group) * group.mean() ** 2 for group in groups) / (ranks**2).sum()
    assert _explained(_features(Knob("w", (0, 1, 2)), found), ranks[None]) == pytest.approx([between])
    residual = ranks - np.polyval(np.polyfit(np.log(betas), ranks, 2), np.log(betas))
    along = 1 - (residual**2).sum() / (ranks**2).sum()
    beta = Knob("b", low=50, high=1000, log=True)
    assert _explained(_features(beta, found), ranks[None]) == pytest.approx([along])
    assert _ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [1.0, -1.5, 1.0, -0.5]


def test_too_few_or_equal_trials_give_none() -> None:
    judged = trials(lambda point: math.log(point["training.beta"]), 8)
    assert importance(SPACE, judged, "reward") is not None
    assert importance(SPACE, judged[:-1], "reward") is None
    assert importance(SPACE, [], "reward") is None
    assert importance(SPACE, judged, "diversity") is None, "no trial reported it"
    alike = [Trial(trial.number, trial.point, DONE, ({"stage": 1, "reward": 0.5},)) for trial in judged]
    assert importance(SPACE, alike, "reward") is None


def test_only_ended_trials_with_a_value_count_by_their_last_report() -> None:
    judged = trials(lambda point: math.log(point["training.beta"]), 12)
    expected = importance(SPACE, judged, "reward")
    earlier = {"stage": 0, "reward": -9.0}
    stopped = [Trial(trial.number, trial.point, STOPPED, (earlier, *trial.reports)) for trial in judged]
    assert importance(SPACE, stopped, "reward") == expected
    others = [
        Trial(20, judged[0].point, RUNNING, ({"stage": 1, "reward": 50.0},)),
        Trial(21, judged[0].point, FAILED, ({"stage": 1, "reward": 50.0},)),
        Trial(22, judged[0].point, DONE, ({"stage": 1, "reward": None},)),
        Trial(23, judged[0].point | {"training.beta": 5.0}, DONE, ({"stage": 1, "reward": 50.0},)),
    ]
    assert importance(SPACE, [*judged, *others], "reward") == expected

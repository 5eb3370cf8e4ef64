"""Trials on Ray Tune: early stopping, and the state after crashes and interruptions."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.config import load_config
from cdpo_ray.errors import ResourceError, TrainingError
from cdpo_ray.search.search import max_concurrent_trials
from cdpo_ray.search.trials import DONE, FAILED, RUNNING, STOPPED, Halving, Trial, Trials, read_trial

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NUM_STAGES = 4
BY_REWARD = Halving("reward", max_stages=NUM_STAGES, grace_stages=1, reduction_factor=2)


@pytest.fixture(scope="module", autouse=True)
def pickled_by_value(local_ray: None) -> None:
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a trial's process cannot import tests


def stage_report(stage: int, reward: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "is_last": stage == NUM_STAGES,
        "reward": reward,
        "win_rate": 0.5,
        "diversity": 0.1,
        "implicit_accuracy": None,
    }


def climb(name: str, report: Callable[[dict[str, Any]], None], *, trials_dir: Path) -> None:
    """Stand-in for a training: the reward grows by the point's worth per stage; the point may make it fail."""
    trial = read_trial(trials_dir / name)
    starts = trials_dir / name / "starts"
    starts.touch()
    num_started = len(starts.read_text().splitlines())
    starts.write_text(starts.read_text() + f"{os.getpid()}\n")
    for stage in range(trial.last_stage + 1, NUM_STAGES + 1):
        match trial.point.get("training.ends") if stage == 2 else None:
            case "error of ours":
                raise TrainingError("training: loss was not finite; lower `training.learning_rate`")
            case "error":
                raise RuntimeError("somebody else's code")
            case "kill" if not num_started:
                os.kill(os.getpid(), signal.SIGKILL)
            case "never":
                time.sleep(600)
        report(stage_report(stage, trial.point["training.worth"] * stage))


def run(trials: Trials, points: list[dict[str, Any]], again: tuple[str, ...] = (), **options: Any) -> list[Trial]:
    """Run trials of ``points``, after those to resume; returns the trial after each change, in order."""
    from cdpo_ray.search.tuner import run_trials

    changed: list[Trial] = []
    waiting = [trials[name] for name in again]
    waiting += [Trial(len(trials) + index, point) for index, point in enumerate(points, start=1)]

    def propose() -> Trial | None:
        return trials.put(replace(waiting.pop(0), state=RUNNING)) if waiting else None

    arguments = {"max_concurrent_trials": 1, "halving": BY_REWARD, "max_restarts": 1} | options
    arguments = {"on_change": changed.append} | arguments
    run_trials(trials, propose, functools.partial(climb, trials_dir=trials.path), **arguments)
    return changed


def test_a_poor_trial_ends_after_its_first_stage(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    run(trials, [{"training.worth": 1.0}, {"training.worth": 5.0}, {"training.worth": 3.0}, {"training.worth": 2.0}])
    reached = {trial.point["training.worth"]: (trial.state, trial.last_stage) for trial in trials.values()}
    # By hand, in this order: 5 is above 1. 3 is the median of 1 and 5 at the first stage, and continues; at the second
    # it is 6, the median of 2 and 10; at the fourth all have ended. 2 is below 3, the median of 1, 5 and 3.
    assert reached == {1.0: (DONE, 4), 5.0: (DONE, 4), 3.0: (DONE, 4), 2.0: (STOPPED, 1)}
    orders = [report["order"] for trial in trials.values() for report in trial.reports]
    assert sorted(orders) == list(range(1, 14))
    assert Trials(tmp_path) == trials, "the files must agree"


def test_fault_28_a_trial_that_crashes_or_fails_does_not_affect_others(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    points = [
        {"training.worth": 1.0},
        {"training.worth": 1.0, "training.ends": "kill"},
        {"training.worth": 1.0, "training.ends": "error"},
        {"training.worth": 1.0, "training.ends": "error of ours"},
        {"training.worth": 1.0},
    ]
    run(trials, points, halving=None)
    whole, killed, broken, failed, last = trials.values()
    assert (whole.state, last.state) == (DONE, DONE)
    assert killed.state == DONE and [report["stage"] for report in killed.reports] == [1, 2, 3, 4]
    assert (broken.state, broken.last_stage, broken.error) == (FAILED, 1, "RuntimeError: somebody else's code")
    assert failed.state == FAILED and (failed.error or "").startswith("TrainingError: training: loss was not finite")
    starts = [len((tmp_path / trial.name / "starts").read_text().splitlines()) for trial in trials.values()]
    assert starts == [1, 2, 2, 1, 1], "an error of ours must not cause a restart"


def test_fault_28_ctrl_c_ends_running_trials_and_leaves_them_resumable(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(
            trials,
            [{"training.worth": 1.0, "training.ends": "never"}],
            on_change=lambda trial: os.kill(os.getpid(), signal.SIGINT),
        )
    assert time.monotonic() - started < 60
    (trial,) = Trials(tmp_path).values()
    assert (trial.state, trial.last_stage) == (RUNNING, 1)
    process = Path("/proc") / (tmp_path / "001" / "starts").read_text().strip()
    while process.exists() and "Z" not in (process / "stat").read_text().split(")")[1][:3]:
        time.sleep(0.2)


def test_fault_28_a_resumed_search_stops_the_trials_that_the_killed_one_would_have_stopped(tmp_path: Path) -> None:
    trials = Trials(tmp_path)
    for number, worth in enumerate([4.0, 6.0, 5.0], start=1):
        trials.put(Trial(number, {"training.worth": worth}))
    trials.add_report("002", stage_report(1, 6.0))
    trials.add_report("001", stage_report(1, 4.0))  # below 6, but the paper's trial is never stopped
    trials.add_report("003", stage_report(1, 4.5))  # below 5, the median; the process was killed before it stored that
    again = Trials(tmp_path)
    changed = run(again, [{"training.worth": 1.0}], again=("001", "002"))
    assert again["003"].state == STOPPED and again["004"].state == STOPPED
    assert again["001"].state == DONE and again["002"].state == DONE
    for name in ("001", "002"):
        assert [report["stage"] for report in again[name].reports] == [1, 2, 3, 4], "no stage twice"
    assert [trial.last_stage for trial in changed if trial.name == "001"] == [2, 3, 4], "it must resume, not restart"


def test_concurrency_is_limited_by_room_and_config_and_a_trial_that_does_not_fit_is_refused() -> None:
    def room(*overrides: str) -> int:
        config = load_config(Path(__file__).parents[2] / "configs" / "tune.yaml", overrides)
        assert config.search is not None
        return max_concurrent_trials(config, config.search)

    # The local Ray has 4 CPUs, and the driver of a trial takes a hundredth of one.
    assert room() == 2, "the config's limit"
    assert room("search.max_concurrent_trials=null") == 3
    assert room("search.max_concurrent_trials=9", "resources.trainers.cpus_per_worker=1.5") == 2
    with pytest.raises(ResourceError, match=r"`training\.num_workers`: a trial needs 8 workers .* room for 3 of them"):
        room("training.num_workers=8")

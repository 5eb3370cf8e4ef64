"""Ray Tune: trials side by side, each a whole training; it is told what to try, and what we keep is not its own."""

import math
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Callback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from cdpo_ray.errors import CdpoError
from cdpo_ray.search.trials import (
    DRIVER_CPUS,
    FAILED,
    OBJECTIVES,
    PAPER,
    RUNNING,
    STOPPED,
    Halving,
    Report,
    Trial,
    Trials,
)

POLL_SECONDS = 0.5
END_SECONDS = 20.0  # for Tune to end its trials
NOTHING: Report = {"stage": 0, **dict.fromkeys(OBJECTIVES)}

Work = Callable[[str, Callable[[Report], None]], None]
"""Trains the trial of that name, in a process of its own, and reports its stages, but for those reported before."""


def run_trials(
    trials: Trials,
    propose: Callable[[], Trial | None],
    work: Work,
    *,
    max_concurrent_trials: int,
    halving: Halving | None,
    max_restarts: int,
    on_change: Callable[[Trial], Any],
) -> None:
    """Run proposed trials, so many at a time; what they report is in ``trials`` before anything follows from it.

    A trial that fails does not hold up the others. Ray's own records of a search are not read: each is new to it.

    Args:
        propose: the next trial, new or broken off; none if there is no more.
        halving: none stops no trial early.
        max_restarts: of a trial whose process, or whose workers, die.
        on_change: called after each report, and when a trial ends.

    Raises:
        KeyboardInterrupt: the trials are broken off, and go on from their last commits when proposed again.
    """
    failures: list[Exception] = []
    asked = threading.Event()

    def run_one(config: dict[str, str]) -> None:
        try:
            work(config["name"], lambda report: tune.report(_metrics(report) | {"report": report}))
        except CdpoError as error:  # no restart mends it
            tune.report(_metrics(NOTHING) | {"error": f"{type(error).__name__}: {error}"})

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as ray_dir:
        tuner = tune.Tuner(
            tune.with_resources(run_one, {"CPU": DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(propose),
                scheduler=_StageHalving(halving, trials) if halving else FIFOScheduler(),
                num_samples=-1,  # until no more is proposed
                max_concurrent_trials=max_concurrent_trials,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=ray_dir,
                callbacks=[_Records(trials, on_change)],
                failure_config=tune.FailureConfig(max_failures=max_restarts),
                stop=_WhenAsked(asked),
                verbose=0,
            ),
        )

        def fit() -> None:
            try:
                tuner.fit()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=fit, daemon=True)  # in the main thread Tune would take our signals
        thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        except KeyboardInterrupt:
            asked.set()
            thread.join(END_SECONDS)  # were Ray gone while Tune still asks it, the process would die of that
            raise
    if failures:
        raise failures[0]


class _NotKept:
    """Tune writes itself to a disk at every turn; what it is told by us it need not."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _WhenAsked(_NotKept, Stopper):
    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked

    def __call__(self, trial_id: str, result: Report) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.asked.is_set()


class _Proposals(_NotKept, Searcher):
    def __init__(self, propose: Callable[[], Trial | None]) -> None:
        super().__init__()
        self.propose = propose

    def suggest(self, trial_id: str) -> Any:
        trial = self.propose()
        return {"name": trial.name} if trial else self.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """What a trial came to is in its file."""

    def save(self, checkpoint_path: str) -> None:
        """There is nothing to keep."""

    def restore(self, checkpoint_path: str) -> None:
        """There is nothing to keep."""


class _StageHalving(AsyncHyperBandScheduler):
    """The library's, that knows what earlier processes saw, and lets the paper's trial reach its end."""

    def __init__(self, halving: Halving, trials: Trials) -> None:
        super().__init__(
            "stage",
            halving.metric,
            "max",
            max_t=max(halving.max_stages, halving.grace_stages),
            grace_period=halving.grace_stages,
            reduction_factor=halving.reduction_factor,
        )
        self.trials = trials
        reports = [(report["order"], trial, report) for trial in trials.values() for report in trial.reports]
        for _, trial, report in sorted(reports, key=lambda each: each[0]):
            seen = _SeenTrial(f"seen-{trial.name}", {"name": trial.name})
            if seen.trial_id not in self._trial_info:
                self.on_trial_add(None, seen)
            decision = self.on_trial_result(None, seen, _metrics(report))
            if decision == TrialScheduler.STOP and trial.state == RUNNING and report is trial.reports[-1]:
                trials.put(replace(trial, state=STOPPED))  # it was to be stopped when the process was killed

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Report) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if self.trials[trial.config["name"]].number == PAPER else decision


@dataclass(frozen=True)
class _SeenTrial:
    """What the scheduler looks at of a trial."""

    trial_id: str
    config: dict[str, str]


class _Records(_NotKept, Callback):
    def __init__(self, trials: Trials, on_change: Callable[[Trial], Any]) -> None:
        self.trials = trials
        self.on_change = on_change

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Report, **info: Any) -> None:
        name = trial.config["name"]
        if "error" in result:
            self.on_change(self.trials.put(replace(self.trials[name], state=FAILED, error=result["error"])))
        else:
            before = self.trials[name]
            if (now := self.trials.add_report(name, result["report"])) is not before:
                self.on_change(now)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        ended = self.trials[trial.config["name"]]
        if ended.state == RUNNING:
            self.on_change(self.trials.put(replace(ended, state=STOPPED)))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        last_line = Path(trial.error_file).read_text().strip().splitlines()[-1]
        self.on_change(self.trials.put(replace(self.trials[trial.config["name"]], state=FAILED, error=last_line)))


def _metrics(report: Report) -> Report:
    """What schedulers look at; what could not be measured is not a number, which stops no trial."""
    return {"stage": report["stage"]} | {
        name: math.nan if report[name] is None else report[name] for name in OBJECTIVES
    }

"""Ray Tune: concurrent trials, each a whole training; points and records are ours, not Tune's."""

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
END_SECONDS = 20.0  # time for Tune to end its trials
NOTHING: Report = {"stage": 0, **dict.fromkeys(OBJECTIVES)}

Work = Callable[[str, Callable[[Report], None]], None]
"""Trains the trial with the given name in its own process, and reports each stage that was not reported before."""


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
    """Run proposed trials concurrently; a report is stored in ``trials`` before it has any effect.

    A failed trial does not affect the others. Tune's own records are not used to resume a search.

    Args:
        trials: folder of the trials.
        propose: returns the next trial, new or interrupted; `None`: no more trials.
        work: trains one trial.
        max_concurrent_trials: maximum number of trials that run at the same time.
        halving: early stopping; `None`: no trial is stopped early.
        max_restarts: maximum number of restarts of a trial after its process or its workers died.
        on_change: called after each report, and when a trial ends.

    Raises:
        KeyboardInterrupt: the trials are interrupted; they resume from their last checkpoints when proposed again.
    """
    failures: list[Exception] = []
    interrupted = threading.Event()

    def run_one(config: dict[str, str]) -> None:
        try:
            work(config["name"], lambda report: tune.report(_metrics(report) | {"report": report}))
        except CdpoError as error:  # a restart would not help
            tune.report(_metrics(NOTHING) | {"error": f"{type(error).__name__}: {error}"})

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as ray_dir:
        tuner = tune.Tuner(
            tune.with_resources(run_one, {"CPU": DRIVER_CPUS}),
            tune_config=tune.TuneConfig(
                search_alg=_Proposals(propose),
                scheduler=_StageHalving(halving, trials) if halving else FIFOScheduler(),
                num_samples=-1,  # until `propose` returns None
                max_concurrent_trials=max_concurrent_trials,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=ray_dir,
                callbacks=[_Records(trials, on_change)],
                failure_config=tune.FailureConfig(max_failures=max_restarts),
                stop=_WhenInterrupted(interrupted),
                verbose=0,
            ),
        )

        def fit() -> None:
            try:
                tuner.fit()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=fit, daemon=True)  # in the main thread Tune would handle our signals
        thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        except KeyboardInterrupt:
            interrupted.set()
            thread.join(END_SECONDS)  # a call of Tune to Ray after its shutdown would kill this process
            raise
    if failures:
        raise failures[0]


class _NotPickled:
    """Excludes an object of ours from the state that Tune writes to disk at every event."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _WhenInterrupted(_NotPickled, Stopper):
    def __init__(self, interrupted: threading.Event) -> None:
        self.interrupted = interrupted

    def __call__(self, trial_id: str, result: Report) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.interrupted.is_set()


class _Proposals(_NotPickled, Searcher):
    def __init__(self, propose: Callable[[], Trial | None]) -> None:
        super().__init__()
        self.propose = propose

    def suggest(self, trial_id: str) -> Any:
        trial = self.propose()
        return {"name": trial.name} if trial else self.FINISHED

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing to do: `_Records` stores the results."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class _StageHalving(AsyncHyperBandScheduler):
    """Tune's ASHA scheduler, with the reports of earlier processes; it never stops the paper's trial."""

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
                trials.put(replace(trial, state=STOPPED))  # the process was killed before it stored this decision

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Report) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if self.trials[trial.config["name"]].number == PAPER else decision


@dataclass(frozen=True)
class _SeenTrial:
    """The attributes of a trial that the scheduler reads."""

    trial_id: str
    config: dict[str, str]


class _Records(_NotPickled, Callback):
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
    """Metrics for the schedulers; a missing value is NaN, which stops no trial."""
    return {"stage": report["stage"]} | {
        name: math.nan if report[name] is None else report[name] for name in OBJECTIVES
    }

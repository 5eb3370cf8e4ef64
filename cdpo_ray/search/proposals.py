"""Search space and earlier trials -> the next point to try."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from cdpo_ray.config.knobs import grid_points
from cdpo_ray.randomness.numbers import random_words, unit_interval
from cdpo_ray.search.space import Knob, Space, is_in
from cdpo_ray.search.trials import DONE, RUNNING, STOPPED, Point, Trial

MAX_ATTEMPTS = 200
MAX_LISTED = 10_000
MAX_STARTUP_TRIALS = 10
"""Random trials before the search learns from them; fewer in a small space."""


@dataclass(frozen=True)
class Proposal:
    """Next point to try.

    Attributes:
        point: `None`: the space has no more points.
        num_invalid: number of skipped points whose values are not valid together.
        num_known: number of skipped points that earlier trials have.
    """

    point: Point | None
    num_invalid: int = 0
    num_known: int = 0


def propose(
    space: Space,
    algorithm: str,
    objectives: Sequence[str],
    number: int,
    known: Sequence[Trial],
    seed: int,
    is_valid: Callable[[Point], bool],
) -> Proposal:
    """The next point to try, a function of the arguments only, so that a killed search resumes with the same trials.

    Args:
        space: knobs and their ranges or choices.
        algorithm: key of `ALGORITHMS`.
        objectives: keys of a trial's reports, all maximised.
        number: number of the trial; the first is the paper's and is not proposed here.
        known: trials that were started before, in any state.
        seed: seed of the search.
        is_valid: returns whether the values of a point are valid together.
    """
    tried = [trial.point for trial in known]
    num_invalid = num_known = 0
    by_number = sorted(known, key=lambda trial: trial.number)
    for point in ALGORITHMS[algorithm](space, objectives, number, by_number, seed):
        if point in tried:
            num_known += 1
        elif not is_valid(point):
            num_invalid += 1
        else:
            return Proposal(point, num_invalid, num_known)
    return Proposal(None, num_invalid, num_known)


def _by_grid(
    space: Space, objectives: Sequence[str], number: int, known: Sequence[Trial], seed: int
) -> Iterator[Point]:
    return grid_points(space)


def _at_random(
    space: Space, objectives: Sequence[str], number: int, known: Sequence[Trial], seed: int
) -> Iterator[Point]:
    for attempt in range(MAX_ATTEMPTS):
        point: Point = {}
        for knob in space:
            if knob.is_active(point):
                words = random_words(f"trial/{number}/{knob.key}", seed, attempt, 1)
                point[knob.key] = _value(knob, float(unit_interval(words)[0]))
        yield point
    yield from _what_is_left(space)


def _by_tpe(space: Space, objectives: Sequence[str], number: int, known: Sequence[Trial], seed: int) -> Iterator[Point]:
    """One suggestion per attempt, from a new Optuna study that holds the known trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = [frozen for trial in known if (frozen := _frozen_trial(space, objectives, trial))]
    for attempt in range(MAX_ATTEMPTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's warnings of experimental options
            study = optuna.create_study(
                directions=["maximize"] * len(objectives),
                sampler=TPESampler(
                    seed=int(random_words(f"tpe/{number}", seed, attempt, 1)[0] >> 32),
                    n_startup_trials=min(MAX_STARTUP_TRIALS, 2 + len(space)),
                    multivariate=False,
                    constant_liar=True,
                ),
            )
            study.add_trials(trials)
            new_trial = study.ask()
            point: Point = {}
            for knob in space:
                if knob.is_active(point):
                    point[knob.key] = _suggested(knob, new_trial)
        yield point
    yield from _what_is_left(space)


ALGORITHMS = {"random": _at_random, "grid": _by_grid, "tpe": _by_tpe}


def _what_is_left(space: Space) -> Iterator[Point]:
    """All points of a space of choices, in case the draws find no new one."""
    if all(knob.choices for knob in space):
        yield from itertools.islice(grid_points(space), MAX_LISTED)


def _value(knob: Knob, share: float) -> Any:
    """The value at this quantile, in [0, 1), of a knob's distribution."""
    if knob.low is None or knob.high is None:
        return knob.choices[int(share * len(knob.choices))]
    margin = 0.5 if knob.is_integer else 0.0
    low, high = knob.low - margin, knob.high + margin
    if knob.log:
        return _within(knob, low * (high / low) ** share)
    return _within(knob, low + (high - low) * share)


def _within(knob: Knob, value: float) -> float:
    """The value rounded to four significant digits, or to an integer, and clipped to the range."""
    assert knob.low is not None and knob.high is not None
    return min(max(round(value) if knob.is_integer else float(f"{value:.4g}"), knob.low), knob.high)


def _frozen_trial(space: Space, objectives: Sequence[str], trial: Trial) -> FrozenTrial | None:
    """A trial in Optuna's form, with choices as indices; `None` if it is outside the space.

    An ended trial has the values of its last report, which is of an early stage if the trial was stopped; without a
    finite value it counts as failed.
    """
    if not is_in(space, trial.point):
        return None
    active = [knob for knob in space if knob.is_active(trial.point)]
    last = trial.reports[-1] if trial.reports else {}
    values = [float("nan") if last.get(name) is None else float(last[name]) for name in objectives]
    is_judged = trial.state in (DONE, STOPPED) and all(map(math.isfinite, values))
    ended = TrialState.COMPLETE if is_judged else TrialState.FAIL
    return create_trial(
        state=TrialState.RUNNING if trial.state == RUNNING else ended,
        values=values if is_judged else None,
        params={knob.key: _index(knob, trial.point[knob.key]) for knob in active},
        distributions={knob.key: _distribution(knob) for knob in active},
    )


def _distribution(knob: Knob) -> BaseDistribution:
    if knob.low is None or knob.high is None:
        return CategoricalDistribution(range(len(knob.choices)))
    if knob.is_integer:
        return IntDistribution(int(knob.low), int(knob.high), log=knob.log)
    return FloatDistribution(knob.low, knob.high, log=knob.log)


def _index(knob: Knob, value: Any) -> Any:
    return knob.choices.index(value) if knob.choices else value


def _suggested(knob: Knob, trial: optuna.Trial) -> Any:
    if knob.low is None or knob.high is None:
        return knob.choices[trial.suggest_categorical(knob.key, range(len(knob.choices)))]
    if knob.is_integer:
        return trial.suggest_int(knob.key, int(knob.low), int(knob.high), log=knob.log)
    return _within(knob, trial.suggest_float(knob.key, knob.low, knob.high, log=knob.log))

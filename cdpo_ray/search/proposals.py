"""Space and what is known of earlier trials -> what to try next.

A proposal is a function of the space, those trials, its number and the seed, and of nothing else: a search that was
killed goes on with what it would have tried.
"""

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
"""Before the search learns from them; fewer in a small space."""


@dataclass(frozen=True)
class Proposal:
    """What to try next.

    Attributes:
        point: none where the space has no more.
        num_invalid: points passed over because their values do not go together.
        num_known: points passed over because they were tried already.
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
    """The point that a trial tries.

    Args:
        algorithm: a key of `ALGORITHMS`.
        objectives: keys of a trial's reports, all to be raised.
        number: of the trial; the first is the paper's, and not proposed here.
        known: the trials that were begun before, in whatever state.
        is_valid: whether the values of a point go together.
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
    """By a study of Optuna that is told what is known and asked once."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = [known_trial for trial in known if (known_trial := _told(space, objectives, trial))]
    for attempt in range(MAX_ATTEMPTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is experimental in Optuna
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
            asked = study.ask()
            point: Point = {}
            for knob in space:
                if knob.is_active(point):
                    point[knob.key] = _asked(knob, asked)
        yield point
    yield from _what_is_left(space)


ALGORITHMS = {"random": _at_random, "grid": _by_grid, "tpe": _by_tpe}


def _what_is_left(space: Space) -> Iterator[Point]:
    """The points of a space of choices, for when draws find none that is new."""
    if all(knob.choices for knob in space):
        yield from itertools.islice(grid_points(space), MAX_LISTED)


def _value(knob: Knob, share: float) -> Any:
    """The value that has this share, in [0, 1), of the space below it."""
    if knob.low is None or knob.high is None:
        return knob.choices[int(share * len(knob.choices))]
    margin = 0.5 if knob.is_integer else 0.0
    low, high = knob.low - margin, knob.high + margin
    if knob.log:
        return _within(knob, low * (high / low) ** share)
    return _within(knob, low + (high - low) * share)


def _within(knob: Knob, value: float) -> float:
    """A number of the range, of no more digits than one cares to write down."""
    assert knob.low is not None and knob.high is not None
    return min(max(round(value) if knob.is_integer else float(f"{value:.4g}"), knob.low), knob.high)


def _told(space: Space, objectives: Sequence[str], trial: Trial) -> FrozenTrial | None:
    """A trial as Optuna knows it, choices by their place; none if the space does not hold it.

    What ended is told by its last report, of an early stage if it was stopped; what reported no number has failed.
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


def _asked(knob: Knob, trial: optuna.Trial) -> Any:
    if knob.low is None or knob.high is None:
        return knob.choices[trial.suggest_categorical(knob.key, range(len(knob.choices)))]
    if knob.is_integer:
        return trial.suggest_int(knob.key, int(knob.low), int(knob.high), log=knob.log)
    return _within(knob, trial.suggest_float(knob.key, knob.low, knob.high, log=knob.log))

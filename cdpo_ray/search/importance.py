"""Trials -> importance of each knob."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.randomness.numbers import random_words
from cdpo_ray.search.space import Knob, Space, is_in
from cdpo_ray.search.trials import DONE, STOPPED, Trial

MIN_TRIALS = 8
NUM_SHUFFLES, CHANCE = 1000, 0.95


def importance(space: Space, trials: Sequence[Trial], objective: str) -> dict[str, float] | None:
    """Share of each knob in the variation of an objective.

    The explained variance of a knob is the share of the variance of the trials' ranks by the objective that the knob
    explains alone, among the trials that use it: by the mean of each choice, or by a parabola over a range. Chance
    explains some of it if trials are few, and more if a knob has many choices. So each knob is compared with the same
    ranks shuffled: a knob that does not exceed 95 % of the shuffles has a share of 0; the others share in proportion to
    their excess over the mean of the shuffles. Interactions of knobs are not detected, nor are regions that the search
    did not visit.

    Args:
        trials: trials, judged by their last reports; failed and unfinished trials, and those without a finite value or
            outside the space, are ignored.
        objective: key of the reports.

    Returns:
        Shares that sum to 1, or are all 0 if no knob exceeds chance; `None` with fewer than 8 trials, or if all have
        the same value.
    """
    judged = [trial for trial in trials if trial.state in (DONE, STOPPED) and _is_judged(trial, objective)]
    ended = [trial for trial in judged if is_in(space, trial.point)]
    values = np.array([trial.reports[-1][objective] for trial in ended], dtype=float)
    if len(values) < MIN_TRIALS or np.all(values == values[0]):
        return None
    shuffled = [np.argsort(random_words("importance", 0, shuffle, len(values))) for shuffle in range(NUM_SHUFFLES)]
    ranks = _ranks(values)[np.array([np.arange(len(values)), *shuffled])]
    explained = np.array([_explained(_features(knob, ended), ranks) for knob in space])  # [knob, shuffle]
    found, by_chance = explained[:, 0], explained[:, 1:]
    stands_out = found > np.quantile(by_chance, CHANCE, axis=1) + 1e-9
    excess = np.where(stands_out, found - by_chance.mean(axis=1), 0.0)
    shares = excess / excess.sum() if excess.any() else excess
    return {knob.key: float(share) for knob, share in zip(space, shares, strict=True)}


def _is_judged(trial: Trial, objective: str) -> bool:
    value = trial.reports[-1].get(objective) if trial.reports else None
    return value is not None and math.isfinite(value)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each value, minus the mean rank; equal values share their mean rank."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    alike = (values[None, :] == values[:, None]).sum(axis=1)
    return below + (alike - 1) / 2 - (len(values) - 1) / 2


def _features(knob: Knob, trials: Sequence[Trial]) -> NDArray[np.float64]:
    """``[trial, feature]`` regressors of a knob; of mean 0 over the trials that use it, and 0 elsewhere."""
    matters = np.array([knob.key in trial.point for trial in trials])
    given = [trial.point[knob.key] for trial in trials if knob.key in trial.point]
    if knob.low is None or knob.high is None:
        here = np.array([[value == choice for choice in knob.choices] for value in given], dtype=float)
    else:
        places = np.log(given) if knob.log else np.array(given, dtype=float)
        places = places - places.mean() if given else places
        here = np.stack([places, places**2], axis=1)
    features = np.zeros((len(trials), here.shape[1] if given else 1))
    if given:
        features[matters] = here - here.mean(axis=0)
    return features


def _explained(features: NDArray[np.float64], ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[shuffle]`` share of the variance of ``[shuffle, trial]`` ranks that the features explain."""
    scale = np.abs(features).max(axis=0)
    left, strengths, _ = np.linalg.svd(features / np.where(scale > 0, scale, 1.0), full_matrices=False)
    basis = left[:, strengths > 1e-6]
    return ((ranks @ basis) ** 2).sum(axis=1) / (ranks**2).sum(axis=1)

"""Trials -> how much each knob matters."""

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
    """Of what the knobs decide, the share of each.

    It rests on how much of the variance of the trials' ranks by the objective a knob explains by itself, among the
    trials in which it matters: by the mean of each choice, or by a parabola over a range. As some of it is explained by
    chance when trials are few, and more by a knob of more choices, each is held against the same ranks shuffled: one
    that does not exceed 95 % of these has a share of 0, and the shares of the others are by what they exceed the mean
    of these. Knobs that only matter together are not found, and only where the search has been is known.

    Args:
        trials: told by their last reports; those that failed, go on, have no number or are not of the space do not
            count.
        objective: a key of the reports.

    Returns:
        Shares that sum to 1, or all 0 where no knob stands out from chance; none where trials are fewer than 8, or all
        alike.
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
    """Of each value its place, the mean one where it is there more than once, less the mean of all."""
    below = (values[None, :] < values[:, None]).sum(axis=1)
    alike = (values[None, :] == values[:, None]).sum(axis=1)
    return below + (alike - 1) / 2 - (len(values) - 1) / 2


def _features(knob: Knob, trials: Sequence[Trial]) -> NDArray[np.float64]:
    """``[trial, feature]`` what the rank may depend on; of mean 0 where the knob matters, and 0 elsewhere."""
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

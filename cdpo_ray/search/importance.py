"""Trials -> how much each knob matters."""

import warnings
from collections.abc import Sequence

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState, create_trial

from cdpo_ray.curriculum.randomness import random_words
from cdpo_ray.search.proposals import told
from cdpo_ray.search.space import Space
from cdpo_ray.search.trials import Trial

MIN_TRIALS = 8
BETTER_SHARE = 0.5
NUM_SHUFFLES, CHANCE = 200, 0.95


def importance(space: Space, trials: Sequence[Trial], objective: str) -> dict[str, float] | None:
    """Of what the knobs decide, the share of each.

    It rests on PED-ANOVA (arXiv:2304.10255, with conditions arXiv:2601.20800): how far the values of a knob in the
    better half of the trials are from those in all, which a knob that decides nothing leaves alike. So few trials
    differ by chance too, and more so in a range than in a choice of two. Hence each knob is held against the same
    trials with their objectives shuffled: one that does not exceed 95 % of these has a share of 0, and the shares of
    the others are by what they exceed the mean of these. Each knob is looked at alone, and where the search has been.

    Args:
        trials: told by their last reports; those without a number, or not yet ended, do not count.
        objective: a key of the reports.

    Returns:
        Shares that sum to 1, or all 0 where no knob stands out from chance; none where trials are fewer than 8, or all
        alike.
    """
    known = [told(space, [objective], trial) for trial in trials]
    ended = [each for each in known if each is not None and each.state == TrialState.COMPLETE]
    values = np.array([each.values[0] for each in ended])
    if len(ended) < MIN_TRIALS or np.all(values == values[0]):
        return None
    found = _divergences(space, ended, values)
    shuffles = [np.argsort(random_words("importance", 0, shuffle, len(values))) for shuffle in range(NUM_SHUFFLES)]
    by_chance = np.array([_divergences(space, ended, values[order]) for order in shuffles])
    stands_out = found > np.quantile(by_chance, CHANCE, axis=0)
    excess = np.where(stands_out, found - by_chance.mean(axis=0), 0.0)
    shares = excess / excess.sum() if excess.any() else excess
    return {knob.key: float(share) for knob, share in zip(space, shares, strict=True)}


def _divergences(space: Space, trials: Sequence[FrozenTrial], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``[knob]`` PED-ANOVA of the trials with these values in place of their own."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of conditions that few trials meet: what the shuffles are for
        study = optuna.create_study(direction="maximize")
        study.add_trials(
            [
                create_trial(value=float(value), params=trial.params, distributions=trial.distributions)
                for trial, value in zip(trials, values, strict=True)
            ]
        )
        found = PedAnovaImportanceEvaluator(target_quantile=BETTER_SHARE).evaluate(study)
    return np.array([found.get(knob.key, 0.0) for knob in space])

"""Synthetic trials, with reports as trials write them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cdpo_ray.search.trials import DONE, FAILED, PAPER, STOPPED, Point, Trial

JUDGES = ("clip", "oracle")


def heldout_ids(num_prompts: int) -> list[str]:
    """Ids such that every other prompt belongs to the choosing half, from the first on."""
    return [f"{(index % 2) * num_prompts + index:016x}" for index in range(num_prompts)]


def choice(key: str, *choices: Any, when: dict[str, Any] | None = None) -> dict[str, Any]:
    """A knob as plain values."""
    nothing = {"low": None, "high": None, "log": False, "is_integer": False}
    return {"key": key, "choices": choices, "when": when or {}} | nothing


def ranged(key: str, low: float, high: float, *, log: bool = False, is_integer: bool = False) -> dict[str, Any]:
    return {"key": key, "choices": (), "low": low, "high": high, "log": log, "is_integer": is_integer, "when": {}}


ORDERS = ("easy_to_hard", "hard_to_easy", "random", "shuffled", "none", "best_against_worst")
KNOBS = [
    ranged("training.beta", 50, 1000, log=True),
    choice("curriculum.num_stages", 1, 2, 4, 6),
    choice("curriculum.pacing", "cumulative", "sliding_window"),
    choice("curriculum.window", 1, 2, 3, when={"curriculum.pacing": ["sliding_window"]}),
    ranged("training.learning_rate", 1e-5, 1e-3, log=True),
    choice("training.lora.rank", 4, 8, 16),
    choice("curriculum.measure", "rank_gap", "score_gap", "score_gap_quantile", "margin"),
    ranged("curriculum.min_score_gap", 0.0, 0.2),
    choice("curriculum.order", *ORDERS),
    choice("training.loss", "dpo", "ipo"),
]
PAPER_POINT: Point = {
    "training.beta": 200.0,
    "curriculum.num_stages": 4,
    "curriculum.pacing": "cumulative",
    "training.learning_rate": 1e-4,
    "training.lora.rank": 8,
    "curriculum.measure": "rank_gap",
    "curriculum.min_score_gap": 0.0,
    "curriculum.order": "easy_to_hard",
    "training.loss": "dpo",
}


def report(
    stage: int = 1,
    *,
    is_last: bool = True,
    reward: float | None = 0.01,
    width: float = 0.008,
    by_prompt: dict[str, Any] | None = None,
    num_prompts: int = 16,
    **measured: float | None,
) -> dict[str, Any]:
    """Report of one stage; its intervals extend by ``width`` to both sides."""
    middle = reward if reward is not None else 0.0

    def interval(mean: float, reach: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - reach, "high": mean + reach}

    judged = {
        "base": interval(0.3, 0.02),
        "tuned": interval(0.3 + middle, 0.02),
        "difference": interval(middle, width),
        "win_rate": interval(0.5 + 5 * middle, 0.05),
        "num_missing": 0,
    }
    return {
        "stage": stage,
        "is_last": is_last,
        "order": stage,
        "num_prompts": num_prompts,
        "reward": reward,
        "win_rate": 0.5 + 5 * middle,
        "diversity": 0.17,
        "implicit_accuracy": 0.6,
        "judges": dict.fromkeys(JUDGES, judged),
        "by_prompt": by_prompt or {judge: [middle] * num_prompts for judge in JUDGES},
        "training": {"stage": stage},
    } | measured


def done(number: int, reward: float | None, point: Point | None = None, **measured: Any) -> Trial:
    """A finished trial of one stage with this reward."""
    return Trial(number, point or {}, DONE, (report(reward=reward, **measured),))


def confirmed(values: Sequence[Sequence[float | None]], judge: str = "clip", **others: Any) -> dict[int, Trial]:
    """Runs by seed, from ``[seed, prompt]`` differences of one judge and of ``others``."""
    return {
        100 + at: Trial(
            at + 1,
            {},
            DONE,
            (
                report(
                    num_prompts=len(of_seed),
                    by_prompt={judge: list(of_seed)} | {name: list(given[at]) for name, given in others.items()},
                ),
            ),
        )
        for at, of_seed in enumerate(values)
    }


def search_of(num_trials: int, num_knobs: int, seed: int = 0) -> list[Trial]:
    """Trials over the first knobs: some stopped, one failed; the number of stages is the point's, if it has one."""
    rng = np.random.default_rng(seed)
    knobs = KNOBS[:num_knobs]
    keys = {knob["key"] for knob in knobs}
    trials = []
    for number in range(1, num_trials + 1):
        point = {key: value for key, value in PAPER_POINT.items() if key in keys}
        if number != PAPER:
            point = _drawn(knobs, rng)
        num_stages = point.get("curriculum.num_stages", 4)
        goal = 0.02 + 0.01 * rng.normal() + (0.01 if point.get("training.beta", 200) > 300 else 0)
        state = DONE
        if number != PAPER and num_stages > 1 and rng.random() < 0.5:
            state = STOPPED
        if number == 5:
            state = FAILED
        shown = num_stages if state == DONE else int(rng.integers(1, max(2, num_stages)))
        if state == FAILED:
            shown = 0
        reports = tuple(
            report(
                stage,
                is_last=stage == num_stages,
                reward=float(goal * stage / num_stages + 0.003 * rng.normal()),
                diversity=float(0.2 - goal + 0.01 * rng.normal()),
                implicit_accuracy=float(0.5 + 3 * goal * stage / num_stages + 0.01 * rng.normal()),
            )
            for stage in range(1, shown + 1)
        )
        error = "TrainingError: 20 updates in a row had a <b>NaN</b> loss; lower `training.learning_rate`"
        trials.append(Trial(number, point, state, reports, error if state == FAILED else None))
    return trials


def _drawn(knobs: Sequence[dict[str, Any]], rng: np.random.Generator) -> Point:
    point: Point = {}
    for knob in knobs:
        if any(point.get(key) not in values for key, values in knob["when"].items()):
            continue
        if knob["choices"]:
            point[knob["key"]] = knob["choices"][rng.integers(len(knob["choices"]))]
        elif knob["log"]:
            point[knob["key"]] = float(np.exp(rng.uniform(np.log(knob["low"]), np.log(knob["high"]))))
        else:
            point[knob["key"]] = float(rng.uniform(knob["low"], knob["high"]))
    return point

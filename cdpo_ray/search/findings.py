"""Trials and confirmation runs -> results of the search: content of `tune.json` and a table for the terminal."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.evaluation.statistics import MIN_PROMPTS, MIN_RUNS, mean_over_runs
from cdpo_ray.pages.page import (
    align_columns,
    direction,
    format_number,
    formatted_interval,
    formatted_share,
    has_interval,
)
from cdpo_ray.search.trials import DONE, FAILED, OBJECTIVES, PAPER, RUNNING, STOPPED, Point, Trial

BETTER, WORSE, NO_DIFFERENCE, NO_VERDICT = "better", "worse", "not significantly different", "no verdict"
VERDICTS = {1: BETTER, 0: NO_DIFFERENCE, -1: WORSE, None: NO_VERDICT}
PAPERS = "the paper's"
MAX_LISTED_CHANGES = 4  # in a sentence


def best(trials: Sequence[Trial], objectives: Sequence[str]) -> Trial | None:
    """The finished trial with the highest first objective, the earliest of equals; `None` if no trial has a value."""
    judged = [trial for trial in trials if trial.state == DONE and value_of(trial, objectives[0]) is not None]
    return max(judged, key=lambda trial: (value_of(trial, objectives[0]), -trial.number), default=None)


def pareto(trials: Sequence[Trial], objectives: Sequence[str]) -> list[int]:
    """Numbers of the Pareto-optimal finished trials: no other is as good in every objective and better in one."""
    judged = {}
    for trial in trials:
        values = [value for objective in objectives if (value := value_of(trial, objective)) is not None]
        if trial.state == DONE and len(values) == len(objectives):
            judged[trial.number] = values
    return sorted(
        number
        for number, values in judged.items()
        if not any(
            other != values and all(theirs >= mine for theirs, mine in zip(other, values, strict=True))
            for other in judged.values()
        )
    )


def value_of(trial: Trial, objective: str) -> float | None:
    """Value of an objective in the last report; `None` if there is no report or the value is not finite."""
    return _finite(trial.reports[-1][objective]) if trial.reports else None


def changes(point: Point, paper_point: Point) -> str:
    """The values in which a trial differs from the paper's, as short text; empty if it does not differ."""
    return ", ".join(f"{short(key)} {value_text(value)}" for key, value in changed(point, paper_point).items())


def changed(point: Point, paper_point: Point) -> Point:
    """The entries of a point that differ from the paper's; a knob that the point does not use follows from another."""
    return {key: value for key, value in point.items() if key not in paper_point or paper_point[key] != value}


def short(key: str) -> str:
    """A key without its section: `beta`, `lora.rank`."""
    return key.partition(".")[2] or key


def value_text(value: Any) -> str:
    """Value of a knob as text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, (list, tuple)):
        return "+".join(map(value_text, value))
    if isinstance(value, float):
        return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def search_summary(
    trials: Sequence[Trial],
    *,
    name: str,
    algorithm: str,
    objectives: Sequence[str],
    judge: str,
    knobs: Sequence[Mapping[str, Any]],
    num_invalid: int,
    importance: Mapping[str, float] | None,
    paper_runs: Mapping[int, Trial],
    found_runs: Mapping[int, Trial],
    heldout_ids: Sequence[str],
    best_config: str | None,
) -> dict[str, Any]:
    """Results of a search as plain values, the content of `tune.json`.

    Args:
        trials: by number; the first is the paper's.
        algorithm: name of the search algorithm in the config.
        objectives: keys of the reports; the first decides.
        judge: judge of `reward`, `win_rate` and the verdict.
        knobs: the search space, `config.knobs.Knob` as plain values. Further keys of the paper's point, in which the
            config departs from the paper, apply to the paper's trial only.
        num_invalid: number of drawn points that were skipped because their values are not valid together.
        importance: share of each knob in the variation of the first objective; `None`: too few trials.
        paper_runs, found_runs: by seed, the paper's and the best schedule, retrained and judged on held-out prompts;
            empty before the confirmation.
        heldout_ids: `prompt_id` of each held-out prompt, in the order of `by_prompt` of the reports.
        best_config: path of the config of the schedule to keep: the best trial's, or the paper's if it is better on the
            choosing half of the held-out prompts.
    """
    paper_point = next((trial.point for trial in trials if trial.number == PAPER), {})
    leader = best(trials, objectives)
    confirmation: dict[str, Any] | None = None
    warnings: list[str] = []
    if leader and leader.number != PAPER:
        confirmation, warnings = confirm(paper_runs, found_runs, judge=judge, heldout_ids=heldout_ids)
    found: dict[str, Any] = {
        "name": name,
        "algorithm": algorithm,
        "objectives": list(objectives),
        "judge": judge,
        "space": json.loads(json.dumps([dict(knob) for knob in knobs])),  # tuples become lists, as in a trial's file
        "counts": {state: Counter(trial.state for trial in trials)[state] for state in (DONE, STOPPED, FAILED, RUNNING)}
        | {"invalid": num_invalid},
        "paper": PAPER,
        "paper_alone": {key: value for key, value in paper_point.items() if key not in {knob["key"] for knob in knobs}},
        "best": leader.number if leader else None,
        "best_point": leader.point if leader else None,
        "best_changes": changed(leader.point, paper_point) if leader else None,
        "kept": _kept(leader, confirmation),
        "best_config": best_config,
        "pareto": pareto(trials, objectives),
        "importance": None if importance is None else dict(importance),
        "trials": [_record(trial, paper_point, objectives, judge) for trial in trials],
        "confirmation": confirmation,
        "verdict": confirmation["judges"][judge]["verdict"] if confirmation else None,
        "warnings": warnings,
    }
    return found | {"sentence": sentence_of(found)}


def chooses(heldout_ids: Sequence[str]) -> NDArray[np.bool_]:
    """Whether a held-out prompt belongs to the choosing half, ``[prompt]``; the others judge.

    The choosing half has the smaller ids, which are hashes: it depends neither on the order of the prompts nor on any
    score. With an odd number of prompts, it is the smaller half.

    Args:
        heldout_ids: `prompt_id` of each prompt.
    """
    chosen = np.zeros(len(heldout_ids), dtype=bool)
    chosen[np.argsort(heldout_ids)[: len(heldout_ids) // 2]] = True
    return chosen


def confirm(
    paper_runs: Mapping[int, Trial], found_runs: Mapping[int, Trial], *, judge: str, heldout_ids: Sequence[str]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Compare the paper's schedule and the found one, trained with the same seeds and judged on the same prompts.

    Half of the prompts choose the schedule to keep, and the other half judge. On the prompts that chose it, the kept
    schedule would look better than it is.

    Args:
        paper_runs, found_runs: by seed; `by_prompt` of their last reports is compared.
        judge: judge that decides.
        heldout_ids: `prompt_id` of each prompt.

    Returns:
        confirmation: `None` while no seed has both runs, or if the deciding judge has no score in one of the halves;
            else `seeds`, `num_choosing` and `num_judging` (numbers of prompts), `choice`, the mean of found minus paper
            by the deciding judge on the choosing half, and `judges`. By judge, on the judging half: `paper` and
            `found`, mean differences to the base model, and `difference`, found minus paper, paired by seed and prompt,
            each a `statistics.Estimate` over seeds and prompts; `by_seed`, the means of each seed for these three;
            `verdict`, `better` or `worse` if the interval of the difference excludes 0, `no verdict` without one.
        warnings: runs and prompts that are excluded.
    """
    arms = {"the paper's schedule": paper_runs, "the found schedule": found_runs}
    warnings = [
        f"seed {at} is excluded: {whose} " + ("is not trained yet" if run is None else _state_and_error(run))
        for at in sorted({*paper_runs} | {*found_runs})
        for whose, runs in arms.items()
        if not _is_judged(run := runs.get(at))
    ]
    seeds = sorted(at for at in {*paper_runs} & {*found_runs} if all(_is_judged(runs[at]) for runs in arms.values()))
    if not seeds:
        return None, warnings
    choosing, choice = chooses(heldout_ids), np.array([])
    judges: dict[str, Any] = {}
    for name in paper_runs[seeds[0]].reports[-1]["by_prompt"]:
        paper, found = (_by_prompt(runs, seeds, name) for runs in (paper_runs, found_runs))
        finite = np.isfinite([*paper, *found]).all(axis=0)
        if name == judge:
            choice = (found - paper)[:, finite & choosing]
        judging = finite & ~choosing
        if judging.any():
            judges[name] = _compared(paper[:, judging], found[:, judging])
        if not finite.all():
            warnings.append(f"{name}: {np.sum(~finite)} of {finite.size} prompts lack a score and are excluded")
    if judge not in judges or not choice.size:
        warnings.append(f"no confirmation: {judge} needs a score in both halves of the held-out prompts; add prompts")
        return None, warnings
    sizes = {"num_choosing": int(choosing.sum()), "num_judging": int((~choosing).sum())}
    return {"seeds": seeds, **sizes, "choice": float(choice.mean()), "judges": judges}, warnings


def _kept(leader: Trial | None, confirmation: Mapping[str, Any] | None) -> int | None:
    if leader and confirmation and confirmation["choice"] <= 0:
        return PAPER
    return leader.number if leader else None


def sentence_of(found: Mapping[str, Any]) -> str:
    """One sentence: whether the found schedule holds on the held-out prompts, and by how much."""
    objective, leader, confirmation = found["objectives"][0], found["best"], found["confirmation"]
    if leader is None:
        return "No trial has finished, so no schedule was found."
    counts = found["counts"]
    num_trials = sum(counts[state] for state in (DONE, STOPPED))
    if leader == found["paper"]:
        others = num_trials - 1
        rest = (
            "no other trial has finished" if not others else f"{others} other trial{'s'[: others > 1]} did not beat it"
        )
        return (
            f"The paper's schedule has the highest {objective} on the validation prompts: {rest}. There is nothing to"
            " confirm."
        )
    record = next(trial for trial in found["trials"] if trial["number"] == leader)
    changes = f" ({record['changes']})" if len(found["best_changes"]) <= MAX_LISTED_CHANGES else ""
    trial = f"trial {leader}{changes}"
    if confirmation is None:
        return (
            f"Not confirmed yet: {trial} has the highest {objective} of {num_trials} trials on the validation prompts,"
            " which overestimate the best of many."
        )
    return _conclusion(found, trial)


def _conclusion(found: Mapping[str, Any], trial: str) -> str:
    """Verdict on the found schedule with its evidence, and which schedule is kept."""
    confirmation = found["confirmation"]
    judged = confirmation["judges"][found["judge"]]
    verdict, difference, num_seeds = judged["verdict"], judged["difference"], len(confirmation["seeds"])
    mean, ends = formatted_interval(difference)
    evidence = (
        f"{found['judge']} {mean} {ends} against the paper's schedule on {confirmation['num_judging']} held-out"
        f" prompts, {num_seeds} {'seed' if num_seeds == 1 else 'seeds'}"
    )
    if verdict == NO_VERDICT:
        conclusion = f"No verdict on {trial}, {evidence}: {no_verdict_sentence(difference['no_interval'])}."
    elif verdict == BETTER:
        conclusion = f"The found schedule holds: {trial} is better, {evidence}."
    else:
        how = "is worse" if verdict == WORSE else "does not differ significantly from the paper's"
        conclusion = f"The found schedule does not hold: {trial} {how}, {evidence}."
    others = [name for name, of_judge in confirmation["judges"].items() if of_judge["verdict"] == WORSE]
    if others and verdict != WORSE:
        conclusion += f" It is worse by {', '.join(others)}."
    kept = "the paper's schedule" if found["kept"] == found["paper"] else f"trial {found['best']}"
    return f"{conclusion} Kept: {kept}, by the mean on the other {confirmation['num_choosing']} held-out prompts."


def no_verdict_sentence(reason: str) -> str:
    """Why a difference has no interval, and what to do."""
    prompts = f"hold out at least {2 * MIN_PROMPTS} prompts"  # of which half judge
    return f"{reason}; set `search.confirm_seeds` to at least {MIN_RUNS} and {prompts}"


def objective_text(objective: str, value: float | None, interval: Mapping[str, float] | None = None) -> str:
    """Value of an objective as text, with its interval if given."""
    if value is None:
        return "–"
    if objective in ("win_rate", "implicit_accuracy"):
        mean, ends = formatted_share(interval or {"mean": value, "low": value, "high": value})
    else:
        mean, ends = formatted_interval(interval or {"mean": value, "low": value, "high": value})
        mean = mean if objective == "reward" else format_number(value, 3)
    return f"{mean} {ends}" if interval else mean


def table_of(found: Mapping[str, Any]) -> str:
    """Tables for the terminal: one row per trial; one row per schedule with one column per judge; the conclusion."""
    objective = found["objectives"][0]
    rows = [["trial", "state", "stage", objective, "changes"]]
    for trial in found["trials"]:
        value = objective_text(objective, trial["values"][objective], trial["interval"])
        marks = " *" if trial["number"] == found["best"] else ""
        rows.append(
            [f"{trial['number']}{marks}", trial["state"], str(trial["stage"] or "–"), value, changes_text(trial)]
        )
    parts = [align_columns(rows)]
    if confirmation := found["confirmation"]:
        judges = confirmation["judges"]
        rows = [["judging prompts", *judges]]
        for key, label in (
            ("paper", "paper - base"),
            ("found", f"found (trial {found['best']}) - base"),
            ("difference", "found - paper"),
        ):
            rows.append([label, *(" ".join(formatted_interval(judge[key])) for judge in judges.values())])
        rows.append(["verdict on found", *(judge["verdict"] for judge in judges.values())])
        parts.append(align_columns(rows))
    return "\n\n".join([*parts, "\n".join([*found["warnings"], found["sentence"]])])


def changes_text(trial: Mapping[str, Any]) -> str:
    """Changes of a trial of `tune.json` against the paper's, as short text."""
    return PAPERS if trial["number"] == PAPER else trial["changes"] or "config's values"


def _record(trial: Trial, paper_point: Point, objectives: Sequence[str], judge: str) -> dict[str, Any]:
    stages = [
        {"stage": report["stage"], "is_last": report["is_last"], "num_prompts": report["num_prompts"]}
        | {measure: _finite(report[measure]) for measure in OBJECTIVES}
        | {"interval": _interval(report, objectives[0], judge)}
        for report in trial.reports
    ]
    return {
        "number": trial.number,
        "state": trial.state,
        "error": trial.error,
        "point": trial.point,
        "changes": changes(trial.point, paper_point),
        "stage": trial.last_stage,
        "values": {objective: value_of(trial, objective) for objective in objectives},
        "interval": stages[-1]["interval"] if stages else None,
        "stages": stages,
    }


def _interval(report: Mapping[str, Any], objective: str, judge: str) -> dict[str, float] | None:
    """Interval over prompts of an objective that a judge measures; else, or with too few prompts, `None`."""
    column = {"reward": "difference", "win_rate": "win_rate"}.get(objective)
    found = report["judges"].get(judge, {}).get(column) if column else None
    if not found or not has_interval(found) or not all(math.isfinite(found[end]) for end in ("mean", "low", "high")):
        return None
    return {end: found[end] for end in ("mean", "low", "high")}


def _compared(paper: NDArray[np.float64], found: NDArray[np.float64]) -> dict[str, Any]:
    """Comparison by one judge, from ``[seed, prompt]`` differences to the base."""
    values = {"paper": paper, "found": found, "difference": found - paper}
    estimates = {whose: asdict(mean_over_runs(of_runs)) for whose, of_runs in values.items()}
    return estimates | {
        "by_seed": {whose: of_runs.mean(axis=1).tolist() for whose, of_runs in values.items()},
        "verdict": VERDICTS[direction(estimates["difference"])],
    }


def _by_prompt(runs: Mapping[int, Trial], seeds: Sequence[int], judge: str) -> NDArray[np.float64]:
    """``[seed, prompt]`` tuned minus base; NaN where a prompt has no score."""
    return np.array([runs[at].reports[-1]["by_prompt"][judge] for at in seeds], dtype=float)


def _is_judged(run: Trial | None) -> bool:
    return run is not None and run.state == DONE and bool(run.reports)


def _state_and_error(run: Trial) -> str:
    return f"{run.state}: {run.error}" if run.error else f"is {run.state}"


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None

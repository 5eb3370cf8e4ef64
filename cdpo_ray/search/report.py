"""Results of a search -> one self-contained HTML page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from cdpo_ray.evaluation.statistics import MIN_PROMPTS
from cdpo_ray.pages.page import (
    decimal_places,
    format_number,
    formatted_interval,
    reasons_without_interval,
    write_page,
)
from cdpo_ray.search import figures
from cdpo_ray.search.findings import (
    VERDICTS,
    changes_text,
    no_verdict_sentence,
    objective_text,
    short,
    value_text,
)
from cdpo_ray.search.trials import DONE, OBJECTIVES, STOPPED

FEW_TRIALS = 20
"""With fewer trials than this, importance is called a hint."""

CHANGES = {verdict: change for change, verdict in VERDICTS.items()}


def write_report(found: Mapping[str, Any], path: Path) -> None:
    """Write the page of a search atomically; it needs no other file and no network.

    Args:
        found: content of `tune.json`, from `findings.search_summary`.
        path: path of the HTML file; replaced if it exists.
    """
    judges = found["confirmation"]["judges"] if found["confirmation"] else {}
    write_page(
        path,
        Path(__file__).with_name("tune.html.jinja"),
        **found,
        paper_alone_text=", ".join(f"{short(key)} {value_text(value)}" for key, value in found["paper_alone"].items()),
        change=CHANGES.get(found["verdict"]),
        best_yaml=yaml.safe_dump(sections(found["best_changes"]), sort_keys=False) if found["best_changes"] else "",
        choice=_choice(found["confirmation"]),
        no_verdict=[no_verdict_sentence(reason) for reason in reasons_without_interval(judges)],
        confirmation_rows=[_confirmation_row(name, of_judge, found["judge"]) for name, of_judge in judges.items()],
        charts={name: Markup(svg) for name, svg in _charts(found).items()},
        num_judged=_num_judged(found),
        few_trials=FEW_TRIALS,
        min_prompts=MIN_PROMPTS,
        measures=_measures(found),
        rows=[_trial_row(trial, found) for trial in found["trials"]],
    )


def sections(point: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots -> nested sections, as in a config."""
    nested: dict[str, Any] = {}
    for key, value in point.items():
        *outer, last = key.split(".")
        section = nested
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
    return nested


def _charts(found: Mapping[str, Any]) -> dict[str, str]:
    """The charts for which there are values."""
    trials, objectives = found["trials"], found["objectives"]
    marked = {"paper": found["paper"], "best": found["best"]}
    charts = {}
    if trials:
        charts["parallel"] = figures.parallel_coordinates(trials, found["space"], objectives[0], **marked)
    if measures := [
        measure
        for measure in dict.fromkeys([objectives[0], "reward", "implicit_accuracy"])
        if any(stage[measure] is not None for trial in trials for stage in trial["stages"])
    ]:
        charts["curves"] = figures.stage_curves(trials, measures, objectives[0], **marked)
    if any((found["importance"] or {}).values()):
        charts["importance"] = figures.importance_bars(found["importance"])
    if len(objectives) > 1 and any(None not in trial["values"].values() for trial in trials):
        charts["pareto"] = figures.pareto_scatter(trials, objectives, found["pareto"], **marked)
    if found["confirmation"]:
        charts["confirmation"] = figures.confirmation_dots(found["confirmation"]["judges"])
    return charts


def _measures(found: Mapping[str, Any]) -> list[str]:
    """Columns of the table of trials: the objectives, then the other measures."""
    return list(dict.fromkeys([*found["objectives"], *OBJECTIVES]))


def _num_judged(found: Mapping[str, Any]) -> int:
    objective = found["objectives"][0]
    return sum(
        trial["state"] in (DONE, STOPPED) and trial["values"][objective] is not None for trial in found["trials"]
    )


def _confirmation_row(name: str, of_judge: Mapping[str, Any], decides: str) -> dict[str, Any]:
    row: dict[str, Any] = {arm: formatted_interval(of_judge[arm]) for arm in ("paper", "found", "difference")}
    places = decimal_places(of_judge["difference"])
    by_seed = [format_number(mean, places, "+") for mean in of_judge["by_seed"]["difference"]]
    verdict = of_judge["verdict"]
    return row | {
        "name": name,
        "decides": name == decides,
        "by_seed": by_seed,
        "verdict": verdict,
        "change": CHANGES[verdict],
    }


def _choice(confirmation: Mapping[str, Any] | None) -> str | None:
    """Mean of found minus paper on the choosing half, as text."""
    if not confirmation:
        return None
    mean = confirmation["choice"]
    return format_number(mean, decimal_places({"low": mean, "high": mean}), "+")


def _trial_row(trial: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    objective, stages = found["objectives"][0], trial["stages"]
    last = stages[-1] if stages else dict.fromkeys(_measures(found))
    mark = " (best)" if trial["number"] == found["best"] else ""
    return {
        "number": f"{trial['number']}{mark}",
        "changes": changes_text(trial),
        "state": trial["state"],
        "stage": trial["stage"] or "–",
        "interval": objective_text(objective, last[objective], trial["interval"]),
        "others": [objective_text(measure, last[measure]) for measure in _measures(found)[1:]],
        "course": _course(objective, [stage[objective] for stage in stages]),
        "error": trial["error"],
    }


def _course(objective: str, values: Sequence[float | None]) -> str:
    """Values from stage to stage, with the decimal places of the largest."""
    reached = max((abs(value) for value in values if value is not None), default=0.0)
    places = decimal_places({"low": -reached, "high": reached})
    texts = [
        objective_text(objective, value)
        if objective != "reward" or value is None
        else format_number(value, places, "+")
        for value in values
    ]
    return " → ".join(texts) or "–"

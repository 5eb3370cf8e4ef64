"""What a search found -> one self-contained page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from cdpo_ray.pages.page import decimal_places, format_number, formatted_interval, write_page
from cdpo_ray.search import figures
from cdpo_ray.search.findings import MEASURED, VERDICTS, short, spoken, spoken_objective, tried
from cdpo_ray.search.trials import DONE, STOPPED

FEW_TRIALS = 20
"""Below this many with a value, the importance of a knob is a hint at most."""

CHANGES = {verdict: change for change, verdict in VERDICTS.items()}


def write_report(found: Mapping[str, Any], path: Path) -> None:
    """Write the page of a search, whole or not at all; it needs no other file and no network.

    Args:
        found: the numbers of `tune.json`, by `findings.find`.
        path: an HTML file; replaced if it is there.
    """
    judges = found["confirmation"]["judges"] if found["confirmation"] else {}
    write_page(
        path,
        Path(__file__).with_name("tune.html.jinja"),
        **found,
        paper_alone_told=", ".join(f"{short(key)} {spoken(value)}" for key, value in found["paper_alone"].items()),
        change=CHANGES.get(found["verdict"], 0),
        best_yaml=yaml.safe_dump(sections(found["best_changes"]), sort_keys=False) if found["best_changes"] else "",
        confirmation_rows=[_confirmation_row(name, of_judge, found["judge"]) for name, of_judge in judges.items()],
        charts={name: Markup(svg) for name, svg in _charts(found).items()},
        num_judged=_num_judged(found),
        few_trials=FEW_TRIALS,
        measures=_measures(found),
        rows=[_trial_row(trial, found) for trial in found["trials"]],
    )


def sections(point: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots -> sections within sections, as a config has them."""
    nested: dict[str, Any] = {}
    for key, value in point.items():
        *outer, last = key.split(".")
        section = nested
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
    return nested


def _charts(found: Mapping[str, Any]) -> dict[str, str]:
    """Those for which there are numbers."""
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
    """What the table of trials shows: the objectives, then what else was measured."""
    return list(dict.fromkeys([*found["objectives"], *MEASURED]))


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


def _trial_row(trial: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    objective, stages = found["objectives"][0], trial["stages"]
    last = stages[-1] if stages else dict.fromkeys(_measures(found))
    mark = " (best)" if trial["number"] == found["best"] else ""
    return {
        "number": f"{trial['number']}{mark}",
        "tries": tried(trial),
        "state": trial["state"],
        "stage": trial["stage"] or "–",
        "interval": spoken_objective(objective, last[objective], trial["interval"]),
        "others": [spoken_objective(measure, last[measure]) for measure in _measures(found)[1:]],
        "course": _course(objective, [stage[objective] for stage in stages]),
        "error": trial["error"],
    }


def _course(objective: str, values: Sequence[float | None]) -> str:
    """From stage to stage, with the digits of the largest."""
    reached = max((abs(value) for value in values if value is not None), default=0.0)
    places = decimal_places({"low": -reached, "high": reached})
    told = [
        spoken_objective(objective, value)
        if objective != "reward" or value is None
        else format_number(value, places, "+")
        for value in values
    ]
    return " → ".join(told) or "–"

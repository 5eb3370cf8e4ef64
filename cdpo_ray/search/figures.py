"""Results of a search -> charts as inline SVG."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from cdpo_ray.pages.chart_style import BLUE, GREY, INK, STYLE
from cdpo_ray.pages.page import error_bars
from cdpo_ray.pages.svg import blank_figure, inline_svg
from cdpo_ray.search.findings import NO_VERDICT, short, value_text
from cdpo_ray.search.trials import DONE, FAILED, STOPPED

Record = Mapping[str, Any]
"""A trial of `tune.json`."""

UNCHANGED = {"reward": 0.0, "win_rate": 0.5, "implicit_accuracy": 0.5}
"""Values of the base model."""

SPREAD = 0.6  # share of a category's width over which its trials are spread, so that lines do not overlap
GAP = 0.08  # inches between axes with titles
CHARACTER = 0.0155  # width of a character, as a share of an axis
OVER_LINES = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6}
LINES = {DONE: "-", STOPPED: (0, (4, 2)), FAILED: (0, (1, 1.5))}
UNFINISHED = (0, (6, 2, 1, 2))

SCALE: Colormap = LinearSegmentedColormap.from_list(
    "objective", mpl.colormaps["YlOrBr"](np.linspace(0.25, 1, 64))
)  # one hue from light to dark, distinct from the blue and black of the marked trials


def parallel_coordinates(
    trials: Sequence[Record], knobs: Sequence[Mapping[str, Any]], objective: str, *, paper: int, best: int | None
) -> str:
    """One line per trial through one horizontal axis per knob, down to the objective.

    Horizontal axes have room for the names of choices, and many knobs remain readable on a narrow screen.

    Args:
        knobs: `key`, and `choices`, or `low`, `high`, `log` and `is_integer`.
        paper, best: numbers of the trials to highlight.
    """
    colours = _colours(trials, objective)
    values = {trial["number"]: trial["values"][objective] for trial in trials}
    known = [value for value in values.values() if value is not None]
    order = sorted(trials, key=lambda trial: (_key(values[trial["number"]]), trial["number"]))
    rows = [_knob_row(knob, order) for knob in knobs]
    if known:
        rows.append(_objective_row(objective, values))
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.55 + 0.8 * len(rows))
        axes = figure.subplots()
        axes.axis("off")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-len(rows) + 0.42, 0.55)
        for height, row in enumerate(rows):
            _draw_axis(axes, -height, row)
        if known:
            _draw_scale(axes, 1 - len(rows))
        marked = _marked(paper, best)
        width = 1.1 if len(trials) <= 24 else 0.75
        for depth, trial in enumerate(sorted(order, key=lambda trial: trial["number"] in marked)):
            number = trial["number"]
            places = [row["places"].get(number) for row in rows]
            heights = [-height for height, place in enumerate(places) if place is not None]
            xs = [place for place in places if place is not None]
            style: dict[str, Any] = {"color": colours[number], "lw": width, "ls": LINES.get(trial["state"], UNFINISHED)}
            if trial["state"] != DONE:
                style |= {"lw": 0.7 * width}
            if number in marked:
                style |= {"color": marked[number][1], "lw": 2.2, "marker": "o", "markersize": 4}
            axes.plot(xs, heights, zorder=3 + depth, solid_joinstyle="round", clip_on=False, **style)
        _legend(figure, trials, marked)
        return inline_svg(figure, f"Hyperparameters and {_label(objective)} of each trial")


def stage_curves(
    trials: Sequence[Record], measures: Sequence[str], objective: str, *, paper: int, best: int | None
) -> str:
    """Reported measures of each trial after each stage, one axis per measure.

    The paper's and the best trial have 95 % intervals of the objective.

    Args:
        measures: keys of a stage's report.
        paper, best: numbers of the trials to highlight.
    """
    colours = _colours(trials, objective)
    marked = _marked(paper, best)
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.6 + 2.1 * len(measures), gap_inches=GAP)
        all_axes = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
        for axes, measure in zip(all_axes, measures, strict=True):
            if measure in UNCHANGED:
                axes.axhline(UNCHANGED[measure], color=GREY, lw=0.9, ls=":")
            for depth, trial in enumerate(sorted(trials, key=lambda trial: trial["number"] in marked)):
                number = trial["number"]
                shown = [stage for stage in trial["stages"] if stage[measure] is not None]
                if not shown:
                    continue
                stages, values = [stage["stage"] for stage in shown], [stage[measure] for stage in shown]
                if number in marked:
                    apart = 0.04 if number == best else -0.04  # so that the two intervals do not overlap
                    _with_intervals(axes, shown, measure, objective, marked[number][1], apart, zorder=4 + depth)
                    continue
                style = {"lw": 1.1 if trial["state"] == DONE else 0.8, "ls": LINES.get(trial["state"], UNFINISHED)}
                axes.plot(stages, values, color=colours[number], zorder=2, **style)
                end = {DONE: "o", STOPPED: "x", FAILED: "v"}.get(trial["state"], "|")
                axes.plot(
                    stages[-1:], values[-1:], color=colours[number], marker=end, markersize=4, zorder=2, ls="none"
                )
            axes.set_title(_label(measure))
            axes.grid(visible=False, axis="x")
        num_stages = max((stage["stage"] for trial in trials for stage in trial["stages"]), default=1)
        all_axes[-1].set_xlim(0.7, num_stages + 0.3)
        all_axes[-1].set_xticks(range(1, num_stages + 1, math.ceil(num_stages / 10)))
        all_axes[-1].set_xlabel("after stage")
        _legend(figure, [trial for trial in trials if trial["stages"]], marked, ends=True)
        return inline_svg(figure, f"{' and '.join(map(_label, measures))} of each trial after each stage")


def importance_bars(importance: Mapping[str, float]) -> str:
    """Share of importance of each knob, the largest at the top."""
    shares = sorted(importance.items(), key=lambda item: item[1])
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.55 + 0.27 * len(shares))
        axes = figure.subplots()
        axes.barh(range(len(shares)), [100 * share for _, share in shares], color=BLUE, height=0.6)
        axes.set_yticks(range(len(shares)), [short(key) for key, _ in shares])
        for height, (_, share) in enumerate(shares):
            axes.annotate(
                f"{100 * share:.0f} %",
                (100 * share, height),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_xlim(0, max(1.0, 115 * shares[-1][1]))
        axes.set_xlabel("share of importance (%)")
        axes.grid(visible=False, axis="y")
        return inline_svg(figure, "Share of each hyperparameter in the variation of the first objective")


def pareto_scatter(
    trials: Sequence[Record], objectives: Sequence[str], pareto: Sequence[int], *, paper: int, best: int | None
) -> str:
    """Each further objective over the first; Pareto-optimal trials are ringed and, with two objectives, joined."""
    colours = _colours(trials, objectives[0])
    marked = _marked(paper, best)
    judged = [trial for trial in trials if None not in trial["values"].values()]
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.5 + 2.6 * (len(objectives) - 1))
        all_axes = figure.subplots(len(objectives) - 1, 1, sharex=True, squeeze=False)[:, 0]
        for axes, other in zip(all_axes, objectives[1:], strict=True):
            front = sorted(
                (trial["values"][objectives[0]], trial["values"][other])
                for trial in judged
                if trial["number"] in pareto
            )
            if len(objectives) == 2 and front:
                axes.plot(*zip(*_steps(front), strict=True), color=GREY, lw=1, zorder=1)
            for trial in judged:
                number, place = trial["number"], [trial["values"][objectives[0]], trial["values"][other]]
                colour = marked[number][1] if number in marked else colours[number]
                done = trial["state"] == DONE
                axes.plot(
                    *place,
                    marker="o" if done else "x",
                    color=colour,
                    markersize=7 if number in marked else 5,
                    markeredgecolor=INK if number in pareto else colour,
                    markeredgewidth=1.3,
                    ls="none",
                    zorder=4 if number in marked else 3,
                )
                if number in marked or (number in pareto and axes is all_axes[0]):
                    name = f"{number} {marked[number][0]}" if number in marked else f"{number}"
                    axes.annotate(name, place, (5, 4), textcoords="offset points", fontsize=8)
            axes.set_ylabel(_label(other))
            axes.margins(0.12)
            axes.xaxis.set_major_locator(MaxNLocator(6))
        all_axes[-1].set_xlabel(_label(objectives[0]))
        handles = [
            Line2D([], [], marker="o", ls="none", color=GREY, markeredgecolor=INK, label="Pareto-optimal"),
            Line2D([], [], marker="o", ls="none", color=SCALE(0.5), label="done"),
            Line2D([], [], marker="x", ls="none", color=SCALE(0.5), label="stopped early"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return inline_svg(
            figure, f"{', '.join(map(_label, objectives[1:]))} of each trial over {_label(objectives[0])}"
        )


def confirmation_dots(judges: Mapping[str, Mapping[str, Any]]) -> str:
    """The paper's and the found schedule against the base model and against each other, one axis per judge.

    Args:
        judges: `judges` of `findings.confirm`, by name.
    """
    arms = [("difference", "found − paper", INK), ("found", "found − base", BLUE), ("paper", "paper − base", GREY)]
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.35 + 1.25 * len(judges), gap_inches=GAP)
        for axes, (name, found) in zip(
            figure.subplots(len(judges), 1, squeeze=False)[:, 0], judges.items(), strict=True
        ):
            axes.axvline(0, color=GREY, lw=0.8, ls=":", zorder=0)
            for height, (arm, _, colour) in enumerate(arms):
                estimate, of_seeds = found[arm], found["by_seed"][arm]
                axes.plot(of_seeds, [height - 0.24] * len(of_seeds), "o", color=colour, alpha=0.55, markersize=3, mew=0)
                axes.errorbar(
                    estimate["mean"],
                    height,
                    xerr=error_bars(estimate),
                    fmt="o",
                    color=colour,
                    capsize=3,
                    markersize=6,
                    lw=1.8,
                )
            axes.set_yticks(range(len(arms)), [label for _, label, _ in arms])
            axes.set_ylim(-0.6, len(arms) - 0.4)
            axes.margins(x=0.12)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            verdict = found["verdict"]
            axes.set_title(f"{name}: {verdict}" if verdict == NO_VERDICT else f"{name}: found is {verdict}")
        return inline_svg(figure, "Paper's and found schedule on the judging half of the held-out prompts, by judge")


def _knob_row(knob: Mapping[str, Any], trials: Sequence[Record]) -> dict[str, Any]:
    """An axis: its label, `ticks` (position from 0 to 1, and text) and the `places` (positions) of trials by number."""
    key = knob["key"]
    used = {trial["number"]: trial["point"][key] for trial in trials if key in trial["point"]}
    unused = [trial["number"] for trial in trials if key not in trial["point"]]
    reach = 0.86 if unused else 1.0  # to the right of it are the trials that do not use the knob
    if knob["choices"]:
        choices = list(knob["choices"])
        width = reach / len(choices)
        ticks = [(width * (index + 0.5), value_text(choice)) for index, choice in enumerate(choices)]
        places = {
            number: width * (index + 0.5) + offset
            for index, choice in enumerate(choices)
            for number, offset in _apart([number for number, value in used.items() if value == choice], width).items()
        }
        label = short(key)
    else:
        to_place = _ranged(knob["low"], knob["high"], log=knob["log"])
        ticks = [(reach * to_place(value), value_text(float(value))) for value in _tick_values(knob)]
        places = {number: reach * to_place(value) for number, value in used.items()}
        label = short(key) + (" (log)" if knob["log"] else "")
    if unused:
        ticks.append((1 - 0.06, "not used"))
        places |= {number: 1 - 0.06 + offset for number, offset in _apart(unused, 0.1).items()}
    return {"label": label, "ticks": ticks, "places": places, "reach": reach, "is_choice": bool(knob["choices"])}


def _objective_row(objective: str, values: Mapping[int, float | None]) -> dict[str, Any]:
    known = {number: value for number, value in values.items() if value is not None}
    low, high = _span(list(known.values()))
    to_place = _ranged(low, high, log=False)
    ticks = [
        (to_place(tick), value_text(float(tick)))
        for tick in MaxNLocator(5).tick_values(low, high)
        if low <= tick <= high
    ]
    places = {number: to_place(value) for number, value in known.items()}
    return {"label": _label(objective), "ticks": ticks, "places": places, "reach": 1.0, "is_choice": False}


def _draw_axis(axes: Axes, height: float, row: Mapping[str, Any]) -> None:
    axes.plot([0, row["reach"]], [height, height], color=GREY, lw=0.8, zorder=0, clip_on=False)
    axes.text(0, height + 0.14, row["label"], fontsize=8.5, fontweight="bold", va="bottom", zorder=90, bbox=OVER_LINES)
    crowded = any(
        right[0] - left[0] < CHARACTER * (len(left[1]) + len(right[1]) + 2) / 2
        for left, right in pairwise(row["ticks"])
    )
    for index, (place, text) in enumerate(row["ticks"]):
        axes.plot([place, place], [height - 0.05, height + 0.05], color=GREY, lw=0.8, zorder=1, clip_on=False)
        drop = 0.1 + (0.15 if crowded and index % 2 else 0)
        colour, half = GREY if text == "not used" else INK, CHARACTER * len(text) / 2
        x, end = (
            (1.02, "right") if place + half > 1.02 else (-0.02, "left") if place - half < -0.02 else (place, "center")
        )
        axes.text(x, height - drop, text, fontsize=7.5, color=colour, ha=end, va="top", zorder=90, bbox=OVER_LINES)


def _draw_scale(axes: Axes, height: float) -> None:
    edges = np.linspace(0, 1, 33)
    for left, right in pairwise(edges):
        axes.fill_between([left, right], height - 0.05, height + 0.05, color=SCALE((left + right) / 2), lw=0, zorder=1)


def _with_intervals(
    axes: Axes, stages: Sequence[Record], measure: str, objective: str, colour: str, apart: float, *, zorder: float
) -> None:
    places = [stage["stage"] + apart for stage in stages]
    values = [stage[measure] for stage in stages]
    axes.plot(places, values, color=colour, lw=2, marker="o", markersize=4.5, zorder=zorder)
    if measure == objective:
        for place, stage in zip(places, stages, strict=True):
            if interval := stage["interval"]:
                reach = error_bars({**interval, "mean": stage[measure]})
                axes.errorbar(place, stage[measure], yerr=reach, color=colour, capsize=3, lw=1.3, zorder=zorder)


def _legend(
    figure: Any, trials: Sequence[Record], marked: Mapping[int | None, tuple[str, str]], *, ends: bool = False
) -> None:
    numbers = {trial["number"] for trial in trials}
    handles = [
        Line2D([], [], color=colour, lw=2.2, marker="o", markersize=4, label=f"{name} (trial {number})")
        for number, (name, colour) in marked.items()
        if number in numbers
    ]
    labels = {DONE: "done", STOPPED: "stopped early", FAILED: "failed"}
    markers = {DONE: "o", STOPPED: "x", FAILED: "v"}
    for state in [*labels, "running"]:
        others = [trial for trial in trials if trial["state"] == state and trial["number"] not in marked]
        if others:
            style: dict[str, Any] = {"marker": markers.get(state, "|"), "markersize": 4} if ends else {}
            line = LINES.get(state, UNFINISHED)
            colour = GREY if state == FAILED and not ends else SCALE(0.6)
            handles.append(
                Line2D([], [], color=colour, lw=1.1, ls=line, label=labels.get(state, "not finished"), **style)
            )
    figure.legend(handles=handles, loc="outside lower center", ncols=3)


def _marked(paper: int, best: int | None) -> dict[int | None, tuple[str, str]]:
    """Name and colour of the highlighted trials."""
    return {paper: ("paper = best", BLUE)} if paper == best else {paper: ("paper", INK), best: ("best", BLUE)}


def _colours(trials: Sequence[Record], objective: str) -> dict[int, Any]:
    """Colour of each trial by its objective; grey if it has no value."""
    values = {trial["number"]: trial["values"][objective] for trial in trials}
    known = [value for value in values.values() if value is not None]
    to_place = _ranged(*_span(known), log=False)
    return {number: GREY if value is None else SCALE(to_place(value)) for number, value in values.items()}


def _apart(numbers: Sequence[int], width: float) -> dict[int, float]:
    """Offsets of trials from the middle of their category, in the given order."""
    middle = (len(numbers) - 1) / 2
    step = SPREAD * width / max(8, len(numbers))
    return {number: step * (index - middle) for index, number in enumerate(numbers)}


def _ranged(low: float, high: float, *, log: bool) -> Callable[[float], float]:
    """Value -> position, 0 at the low end and 1 at the high; values outside, such as the paper's, are clipped."""
    ends = np.log([low, high]) if log else np.array([low, high], dtype=float)

    def to_place(value: float) -> float:
        at = math.log(value) if log else value
        return float(np.clip((at - ends[0]) / (ends[1] - ends[0]), 0, 1))

    return to_place


def _tick_values(knob: Mapping[str, Any]) -> list[float]:
    """The ends of a range, and round numbers between them."""
    low, high = knob["low"], knob["high"]
    locator = (
        LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,))
        if knob["log"]
        else MaxNLocator(5, integer=knob["is_integer"])
    )
    to_place = _ranged(low, high, log=knob["log"])
    between = [tick for tick in locator.tick_values(low, high) if 0.09 < to_place(tick) < 0.91 and low < tick < high]
    return [low, *between, high]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _steps(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the staircase below a Pareto front: down and right from point to point."""
    corners = [point for (x, y), (right, lower) in pairwise(front) for point in ((x, y), (x, lower))]
    return [*corners, front[-1]]


def _key(value: float | None) -> float:
    return -math.inf if value is None else value


def _label(measure: str) -> str:
    return measure.replace("_", " ")

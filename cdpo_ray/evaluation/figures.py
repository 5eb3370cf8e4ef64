"""Metrics of a run -> charts as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cdpo_ray.errors import printable
from cdpo_ray.pages.chart_style import BLUE, GREY, INK, STYLE, VERMILLION
from cdpo_ray.pages.page import direction, error_bars, has_interval
from cdpo_ray.pages.svg import blank_figure, inline_svg

Values = NDArray[np.floating]

MAX_NAME_CHARS = 28  # of a category on an axis
MAX_POINTS = 2_000  # longer raw curves are thinned: more points are not visible and make the page large


def training_curves(updates: Sequence[Mapping[str, Any]], *, alarm: float | None = None) -> dict[str, str]:
    """Charts over updates with stage boundaries; thin: raw values, bold: moving mean within a stage.

    Args:
        updates: one mapping per update, in order: `update`, `stage`, `loss`, `margin`, `implicit_accuracy`, the four
            errors, and `grad_norm`, `update_norm` and `learning_rate` if they were recorded.
        alarm: change of the chosen's error above which an alarm is raised; drawn if the curve comes near it.

    Returns:
        SVG of `error_change`, `loss`, `implicit_accuracy`, `margin`, and of what else was recorded.
    """
    columns = {key: np.array([update.get(key, np.nan) for update in updates], dtype=float) for key in updates[0]}
    change = {arm: columns[f"policy_error_{arm}"] - columns[f"reference_error_{arm}"] for arm in "wl"}
    place, stages = columns["update"], columns["stage"]
    near = alarm is not None and smooth_within_stages(change["w"], stages).max() > alarm / 2

    def curve(key: str, label: str, untrained: float | None = None) -> str:
        return _curve(place, stages, {"": (columns[key], BLUE)}, label, untrained=untrained)

    return {
        "error_change": _curve(
            place,
            stages,
            {"chosen": (change["w"], BLUE), "rejected": (change["l"], VERMILLION)},
            "policy − reference (MSE)",
            untrained=0,
            alarm=alarm if near else None,
        ),
        "loss": curve("loss", "loss (nats)", untrained=math.log(2)),
        "implicit_accuracy": curve("implicit_accuracy", "share of pairs", untrained=0.5),
        "margin": curve("margin", "margin (nats)", untrained=0),
        **{
            name: curve(name, label)
            for name, label in (
                ("grad_norm", "gradient norm"),
                ("update_norm", "norm of the update"),
                ("learning_rate", "learning rate"),
            )
            if name in columns
        },
    }


def pairs_by_rank_gap(stages: Sequence[Mapping[str, Any]]) -> str:
    """Drawn pairs by rank gap, one strip per stage, easy at the top.

    Args:
        stages: one mapping per stage: `stage`, `min_rank_gap`, `max_rank_gap` and `drawn_by_rank_gap`.
    """
    last = max(stage["max_rank_gap"] for stage in stages)
    edges = np.arange(0.5, last + 1.5)
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.6 + min(0.75, 8 / len(stages)) * len(stages))
        strips = figure.subplots(len(stages), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, stage in zip(strips, stages, strict=True):
            counts = {int(gap): count for gap, count in stage["drawn_by_rank_gap"].items()}
            axes.axvspan(stage["min_rank_gap"] - 0.5, stage["max_rank_gap"] + 0.5, color=BLUE, alpha=0.09, lw=0)
            axes.stairs([counts.get(gap, 0) for gap in range(1, last + 1)], edges, fill=True, color=BLUE)
            axes.set_ylabel(f"stage {stage['stage']}", rotation=0, ha="right", va="center")
            axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
            axes.grid(visible=False, axis="x")
        strips[-1].set_xlim(edges[-1], edges[0])  # easy pairs, far apart in rank, come first
        strips[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
        strips[-1].set_xlabel("rank gap of a pair (easy → hard)")
        figure.suptitle("pairs drawn; shaded: rank gaps of the stage", x=0.01, ha="left", fontsize=9)
        return inline_svg(figure, "Pairs drawn in each stage by rank gap")


def gains(judges: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean score of base and fine-tuned model, with 95 % intervals if any; one axis per judge, as their units differ.

    Args:
        judges: by name, `base` and `tuned`, each a `statistics.Estimate` as plain values.
    """
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.35 + 0.95 * len(judges))
        for axes, (name, found) in zip(
            figure.subplots(len(judges), 1, squeeze=False)[:, 0], judges.items(), strict=True
        ):
            for height, (arm, colour) in enumerate([("fine-tuned", BLUE), ("base", GREY)]):
                estimate = found["base" if arm == "base" else "tuned"]
                reach = error_bars(estimate)
                axes.errorbar(
                    estimate["mean"], height, xerr=reach, fmt="o", color=colour, capsize=3, markersize=6, lw=1.8
                )
            axes.axvline(found["base"]["mean"], color=GREY, lw=0.8, ls=":", zorder=0)
            axes.set_yticks([0, 1], ["fine-tuned", "base"])
            axes.set_ylim(-0.6, 1.6)
            axes.margins(x=0.15)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.set_title(f"{name}: mean score" + (", 95 % interval" if has_interval(found["base"]) else ""))
        return inline_svg(figure, "Mean score of base and fine-tuned model for each judge")


def difference_histograms(differences: Mapping[str, Values]) -> str:
    """Distribution of the score difference over prompts, one axis per judge.

    Args:
        differences: by judge, ``[prompt]`` mean of tuned minus base, without the prompts that have no finite score.
    """
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.2 + 1.45 * len(differences))
        for axes, (name, values) in zip(
            figure.subplots(len(differences), 1, squeeze=False)[:, 0], differences.items(), strict=True
        ):
            edges = _edges_around_zero(values)
            counts, _ = np.histogram(values[values != 0], edges)
            worse = edges[1:] <= 0
            axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=np.where(worse, VERMILLION, BLUE), lw=0)
            axes.axvline(0, color=INK, lw=0.8)
            better, equal = (f"{share.mean():.0%}".replace("%", " %") for share in (values > 0, values == 0))
            axes.set_title(f"{name}: {better} of prompts better, {equal} equal (not drawn)")
            axes.set_xlabel("fine-tuned − base: mean score difference of a prompt")
            axes.set_ylabel("prompts")
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(visible=False, axis="x")
        return inline_svg(figure, "Histogram of the score difference of each prompt, for each judge")


def differences_by_category(categories: Sequence[Mapping[str, Any]], judge: str) -> str:
    """Mean score difference of each category by one judge, with its interval, if any; the first category on top.

    Args:
        categories: `categories` of `metrics.json`, at least one.
    """
    names = [f"{printable(each['category'])[:MAX_NAME_CHARS]} ({each['num_prompts']})" for each in categories]
    with mpl.rc_context(STYLE):
        figure = blank_figure(0.6 + 0.19 * len(categories))
        axes = figure.subplots()
        for height, each in enumerate(categories):
            if found := each["judges"].get(judge):
                estimate = found["difference"]
                colour = {1: BLUE, -1: VERMILLION}.get(direction(estimate) or 0, GREY)
                reach = error_bars(estimate)
                axes.errorbar(estimate["mean"], height, xerr=reach, fmt="o", color=colour, capsize=2, markersize=4)
        axes.axvline(0, color=INK, lw=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.1)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("fine-tuned − base: mean score difference")
        return inline_svg(figure, f"Mean score difference of each category of prompts by {judge}")


def smooth_within_stages(values: Values, stages: Values) -> Values:
    """Centred moving mean over a fifth of each stage, never across its boundary; non-finite values are skipped."""
    smoothed = np.empty_like(values)
    for stage in np.unique(stages):
        inside = stages == stage
        finite = np.isfinite(values[inside])
        window = np.ones(min(len(finite), 2 * (len(finite) // 10) + 1))
        total = np.convolve(np.where(finite, values[inside], 0), window, mode="same")
        count = np.convolve(finite.astype(float), window, mode="same")
        smoothed[inside] = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0.5)
    return smoothed


def _curve(
    place: Values,
    stages: Values,
    series: Mapping[str, tuple[Values, str]],
    label: str,
    *,
    untrained: float | None,
    alarm: float | None = None,
) -> str:
    with mpl.rc_context(STYLE):
        figure = blank_figure(2.7)
        axes = figure.subplots()
        for value, style, name in ((untrained, "--", "before training"), (alarm, ":", "alarm (chosen)")):
            if value is not None:
                axes.axhline(value, color=GREY, lw=0.9, ls=style, label=name)
        thinned = slice(None, None, math.ceil(len(place) / MAX_POINTS))
        marker = "o" if len(place) <= 30 else ""
        for name, (values, colour) in series.items():
            axes.plot(place[thinned], values[thinned], color=colour, lw=0.6, alpha=0.45)
            smoothed = smooth_within_stages(values, stages)
            for number, stage in enumerate(np.unique(stages)):
                inside = np.flatnonzero(stages == stage)[thinned]
                label_once = name if name and number == 0 else None
                axes.plot(
                    place[inside], smoothed[inside], color=colour, lw=2, marker=marker, markersize=3, label=label_once
                )
        _mark_stages(axes, place, stages)
        axes.set_xlabel("update")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(visible=False, axis="x")
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=4)
        return inline_svg(figure, f"{label} over updates")


def _mark_stages(axes: Axes, place: Values, stages: Values) -> None:
    numbers = np.unique(stages)
    axes.set_xlim(place[0] - 0.5, place[-1] + 0.5)
    every = math.ceil(len(numbers) / 8)  # more than eight names would overlap
    for index, stage in enumerate(numbers):
        inside = place[stages == stage]
        if index:
            axes.axvline(inside[0] - 0.5, color=GREY, lw=0.7, alpha=0.6)
        if index % every == 0:
            name = f"stage {stage:.0f}" if len(numbers) <= 6 else f"{stage:.0f}"
            axes.text(
                inside.mean(), 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=8, color=GREY
            )


def _edges_around_zero(values: Values) -> Values:
    """Bin edges of equal width that include 0, so that no bar mixes better and worse prompts."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if low == high:
        return np.array([-0.5, 0.0, 0.5])
    width = (high - low) / min(24, max(4, math.ceil(2 * math.sqrt(len(values)))))
    return width * np.arange(math.floor(low / width), math.ceil(high / width) + 1)

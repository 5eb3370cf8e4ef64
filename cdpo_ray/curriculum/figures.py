"""Statistics of each stage -> chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cdpo_ray.pages.chart_style import BLUE, GREY, STYLE
from cdpo_ray.store import new_file


def draw_stages(stages: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draw two histograms per stage: drawn pairs by rank gap and by score gap, admitted range shaded; easy left.

    Args:
        stages: descriptions of `describe_stage`.
        path: of the PNG.
        title: title of the figure.

    Raises:
        StoreError: if the file cannot be written.
    """
    last_gap = max(stage["max_rank_gap"] for stage in stages)
    rank_edges = np.arange(0.5, last_gap + 1.5)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.5, 1.1 + 1.05 * len(stages)), layout="constrained")
        grid = figure.subplots(len(stages), 2, sharex="col", sharey="col", squeeze=False)
        for (by_rank, by_score), stage in zip(grid, stages, strict=True):
            counts = [stage["drawn_by_rank_gap"].get(str(gap), 0) for gap in range(1, last_gap + 1)]
            _strip(by_rank, counts, rank_edges, stage["min_rank_gap"] - 0.5, stage["max_rank_gap"] + 0.5)
            edges = np.array(stage["score_gap_edges"])
            _strip(by_score, stage["drawn_by_score_gap"], edges, stage["min_score_gap"], stage["max_score_gap"])
            by_rank.set_ylabel(f"stage {stage['stage']}", rotation=0, ha="right", va="center", weight="bold")
            new = "" if stage["num_new_pairs"] is None else f", {stage['num_new_pairs']:,} new"
            by_score.annotate(
                f"{stage['num_candidate_pairs']:,} candidates{new}\n{stage['num_drawn_pairs']:,} drawn,"
                f" {stage['num_distinct_pairs']:,} distinct\n"
                f"{stage['num_prompts_drawn']:,} of {stage['num_prompts_of_run']:,} prompts",
                (1.02, 0.5), xycoords="axes fraction", va="center", fontsize=8, color=GREY,
            )  # fmt: skip
        by_rank.set_xlim(rank_edges[-1], rank_edges[0])
        by_rank.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        by_rank.set_xlabel("rank gap (easy → hard)")
        by_score.set_xlim(edges[-1], edges[0])
        by_score.set_xlabel("score gap (easy → hard)")
        grid[0, 0].set_title("drawn pairs by rank gap; shaded: admitted")
        grid[0, 1].set_title("drawn pairs by score gap; shaded: admitted")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        with new_file(path) as picture:
            figure.savefig(picture, format="png", dpi=160)


def _strip(axes: Axes, counts: Sequence[int], edges: Any, low: float, high: float) -> None:
    axes.axvspan(low, high, color=BLUE, alpha=0.1, lw=0)
    axes.stairs(counts, edges, fill=True, color=BLUE)
    axes.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes.grid(visible=False, axis="x")

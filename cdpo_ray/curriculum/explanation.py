"""Stages -> statistics of each stage, as numbers and as a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.curriculum.pairs import PairArrays, PairSet
from cdpo_ray.curriculum.schedule import Curriculum
from cdpo_ray.store.untrusted import Count, other_keys_allowed

NUM_BINS = 100
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Gap = Annotated[int, Field(ge=0, le=10_000)]
Level = Annotated[list[float], Field(min_length=2, max_length=2)]


@other_keys_allowed
class ShownStage(TypedDict):
    """Keys of `describe_stage` that pages show."""

    stage: Gap
    min_rank_gap: Gap
    max_rank_gap: Gap
    num_candidate_pairs: Count
    num_new_pairs: Count | None
    margin_reliability: Annotated[float, Field(ge=0, le=1)] | None
    num_drawn_pairs: Count
    num_prompts: Count
    drawn_by_rank_gap: dict[Annotated[str, Field(pattern=r"^\d{1,6}$")], Count]


@other_keys_allowed
class DescribedStage(ShownStage):
    """Return value of `describe_stage`."""

    levels: Level
    min_score_gap: float
    max_score_gap: float
    num_distinct_pairs: Count
    gap_noise: float | None
    num_drawn_within_noise: Count | None
    num_prompts_drawn: Count
    num_prompts_of_run: Count
    score_gap_quantiles: dict[str, float]
    score_gap_edges: Annotated[list[float], Field(min_length=NUM_BINS + 1, max_length=NUM_BINS + 1)]
    drawn_by_score_gap: Annotated[list[Count], Field(min_length=NUM_BINS, max_length=NUM_BINS)]


DESCRIBED_STAGES = TypeAdapter(Annotated[list[DescribedStage], Field(min_length=1, max_length=1000)])


def describe_stage(
    curriculum: Curriculum,
    stage: int,
    admitted: PairSet,
    drawn: PairArrays,
    *,
    margin_reliability: float | None = None,
) -> dict[str, Any]:
    """Describe the admitted and the drawn pairs of a stage by plain values.

    Pairs within the noise are counted if the curriculum knows it. Score gaps have the same bins in all stages.

    Args:
        stage: number of the stage, from 1.
        admitted: candidates of the stage.
        drawn: pairs of the stage.
        margin_reliability: of the order by margin, see `curriculum.reliability`; `None`: not measured.
    """
    extent, gap_noise = admitted.extent, curriculum.gap_noise
    counts, edges = np.histogram(drawn.score_gap, NUM_BINS, (0, curriculum.formed.extent.max_score_gap))
    return {
        "stage": stage,
        "levels": list(curriculum.schedule.levels(stage)),
        "min_rank_gap": extent.min_rank_gap,
        "max_rank_gap": extent.max_rank_gap,
        "min_score_gap": extent.min_score_gap,
        "max_score_gap": extent.max_score_gap,
        "num_candidate_pairs": admitted.num_pairs,
        "num_new_pairs": curriculum.num_new_pairs(stage),
        "margin_reliability": margin_reliability,
        "num_drawn_pairs": len(drawn),
        "num_distinct_pairs": len(np.unique(drawn.identity(admitted.ranking.num_samples))),
        "gap_noise": gap_noise,
        "num_drawn_within_noise": None if gap_noise is None else int((drawn.score_gap <= gap_noise).sum()),
        "num_prompts": admitted.num_prompts,
        "num_prompts_drawn": len(np.unique(drawn.prompt)),
        "num_prompts_of_run": len(extent.pairs_per_prompt),
        "drawn_by_rank_gap": {str(gap): count for gap, count in sorted(Counter(drawn.rank_gap.tolist()).items())},
        "score_gap_quantiles": dict(zip(map(str, QUANTILES), np.quantile(drawn.score_gap, QUANTILES), strict=True)),
        "score_gap_edges": edges.tolist(),
        "drawn_by_score_gap": counts.tolist(),
    }


def stages_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """Table for people, one line per stage: gaps of the candidates, median score gap of the draws, and counts.

    The column ``new`` holds the number of pairs in the level that no earlier stage has; "-" in orders without levels.
    If the noise was measured, the last column is the number of drawn pairs within it.
    """
    head = "stage,levels,rank gaps,score gaps,median drawn,candidates,new,drawn,distinct,prompts"
    rows = [head.split(",")]
    for stage in stages:
        rows.append(
            [
                str(stage["stage"]),
                _span(*stage["levels"]),
                _span(stage["min_rank_gap"], stage["max_rank_gap"]),
                _span(stage["min_score_gap"], stage["max_score_gap"]),
                f"{stage['score_gap_quantiles']['0.5']:.4g}",
                f"{stage['num_candidate_pairs']:,}",
                "-" if stage["num_new_pairs"] is None else f"{stage['num_new_pairs']:,}",
                f"{stage['num_drawn_pairs']:,}",
                f"{stage['num_distinct_pairs']:,}",
                f"{stage['num_prompts_drawn']:,} of {stage['num_prompts_of_run']:,}",
            ]
        )
    if stages and (noise := stages[0]["gap_noise"]) is not None:
        rows[0].append(f"within noise {noise:.4g}")
        for row, stage in zip(rows[1:], stages, strict=True):
            row.append(f"{stage['num_drawn_within_noise']:,}")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _span(low: float, high: float) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"

"""Ray Data: the drawn pairs of each stage, written easy to hard."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from cdpo_ray.curriculum.drawing import sort_by_difficulty
from cdpo_ray.curriculum.explanation import describe_stage
from cdpo_ray.curriculum.pairs import PairBatch, PairSet
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.errors import CurriculumError
from cdpo_ray.generation.pool import write_shards
from cdpo_ray.records import score_column
from cdpo_ray.store import write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of the ranking reward: ``prompt_index [prompt]``, ``scores [prompt, sample]``."""

    prompt_index: np.ndarray
    scores: np.ndarray


def read_scores(scores_dir: Path, reward: str) -> ScoreTable:
    """Read `2-scores`, in prompt order."""
    table = pq.read_table(scores_dir / "scores.parquet", columns=["prompt_index", "sample_index", score_column(reward)])
    table = table.sort_by([("prompt_index", "ascending"), ("sample_index", "ascending")])
    prompt_index = np.unique(table["prompt_index"].to_numpy())
    return ScoreTable(prompt_index, table[score_column(reward)].to_numpy().reshape(len(prompt_index), -1))


def write_stages(
    table: ScoreTable,
    output_dir: Path,
    *,
    schedule: Schedule,
    pairs_per_stage: int,
    max_bad_fraction: float,
    seed: int,
) -> dict[str, int]:
    """Write `3-stages`: what each stage trains on, and its counts; returns counts for the manifest.

    Raises:
        CurriculumError: too many scores are not finite, or a stage has no pair.
    """
    ranking = rank_samples(table.scores)
    num_bad = int(ranking.num_set_aside.sum())
    if num_bad > max_bad_fraction * table.scores.size:
        raise CurriculumError(
            f"{num_bad} of {table.scores.size} scores are not finite, more than `rewards.max_bad_fraction`"
            f" = {max_bad_fraction}; mend the reward"
        )
    curriculum = Curriculum(ranking, schedule, seed=seed)
    whole = curriculum.formed.extent
    stages = []
    for stage in range(1, schedule.num_stages + 1):
        drawn, admitted = curriculum.plan(stage, pairs_per_stage)
        pairs = sort_by_difficulty(drawn)
        write_shards(
            ray.data.from_arrow(_rows(pairs, stage, table.prompt_index)), output_dir / f"stage-{stage}", "pairs"
        )
        stages.append(
            describe_stage(stage, schedule.levels(stage), admitted, pairs, largest_score_gap=whole.max_score_gap)
        )
        log.info(
            "stage %d/%d: rank gaps %d to %d, %d pairs of %d prompts admitted, %d drawn",
            stage, schedule.num_stages, stages[-1]["min_rank_gap"], stages[-1]["max_rank_gap"],
            admitted.num_pairs, admitted.num_prompts, len(pairs),
        )  # fmt: skip
        _write_prompt_counts(pairs, table.prompt_index, admitted, output_dir / f"prompts-{stage}.parquet")
    write_json(output_dir / "stages.json", stages)
    return {
        "pairs_drawn": schedule.num_stages * pairs_per_stage,
        "scores_not_finite": num_bad,
        "prompts_without_pairs": int(np.count_nonzero(whole.pairs_per_prompt == 0)),
    }


def _rows(pairs: PairBatch, stage: int, prompt_index: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "stage": np.full(len(pairs), stage),
            "draw": pairs.draw,
            "prompt_index": prompt_index[pairs.prompt],
            "chosen": pairs.chosen,
            "rejected": pairs.rejected,
            "rank_gap": pairs.rank_gap,
            "score_gap": pairs.score_gap,
        }
    )


def _write_prompt_counts(pairs: PairBatch, prompt_index: np.ndarray, admitted: PairSet, path: Path) -> None:
    drawn = np.bincount(pairs.prompt, minlength=len(prompt_index))
    counts = {"prompt_index": prompt_index, "num_candidate_pairs": admitted.pairs_per_prompt, "num_drawn_pairs": drawn}
    pq.write_table(pa.table(counts), path)

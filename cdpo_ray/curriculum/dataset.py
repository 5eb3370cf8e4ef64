"""Scores -> drawn pairs of each stage, written from easy to hard."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from cdpo_ray.curriculum.combination import RankingRule
from cdpo_ray.curriculum.drawing import sort_by_difficulty
from cdpo_ray.curriculum.explanation import describe_stage
from cdpo_ray.curriculum.labels import num_disagreements, where_labels_agree
from cdpo_ray.curriculum.noise import gap_noise
from cdpo_ray.curriculum.pairs import AdmittedPairs, PairArrays, PairSet
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.errors import CurriculumError
from cdpo_ray.records import LABEL, score_file
from cdpo_ray.rewards.score_table import read_scores
from cdpo_ray.store import make_folder, write_json, write_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreTable:
    """Scores that rank the samples.

    Attributes:
        prompt_index: ``[prompt]``.
        scores: ``[prompt, sample]``; NaN: not ranked.
        gap_noise: noise of the score gaps; `None`: not known.
        num_excused: number of NaNs not caused by a reward: no image, or label and score disagree.
        num_disagreeing: number of pairs whose scores disagree with their labels.
    """

    prompt_index: np.ndarray
    scores: np.ndarray
    gap_noise: float | None = None
    num_excused: int = 0
    num_disagreeing: int = 0


def read_ranking_scores(scores_dir: Path, rule: RankingRule) -> ScoreTable:
    """Read the scores of the ranking rewards, in prompt order, and combine them.

    Args:
        scores_dir: folder of the step `2-scores`.

    Raises:
        CurriculumError: if the noise is required, but no prompt has two samples that were scored twice.
    """
    prompt_index, scores = _read(scores_dir, rule.weights)
    table = ScoreTable(prompt_index, rule.combine(scores))
    if rule.with_noise:
        table = _with_noise(table, scores_dir, rule)
    return _where_labelled(table, *read_scores(scores_dir / score_file(LABEL), LABEL)) if rule.with_labels else table


def _with_noise(table: ScoreTable, scores_dir: Path, rule: RankingRule) -> ScoreTable:
    scored_twice, second = _read(scores_dir, rule.weights, second=True)
    noise = gap_noise(table.scores[np.searchsorted(table.prompt_index, scored_twice)], rule.combine(second))
    if np.isnan(noise):
        raise CurriculumError(
            f"{scores_dir}: no prompt has two samples with finite scores in both scorings, so the noise is unknown;"
            " raise `rewards.noise_prompts`, or fix the reward"
        )
    return replace(table, gap_noise=noise)


def _where_labelled(table: ScoreTable, labelled: np.ndarray, labels: np.ndarray) -> ScoreTable:
    """Keep the labelled training prompts; scores that disagree with the labels become NaN, see `where_labels_agree`.

    Args:
        labelled: ``[prompt]`` indices of labelled training prompts.
        labels: ``[prompt, sample]``, higher is preferred; NaN: no image.
    """
    scores = table.scores[np.searchsorted(table.prompt_index, labelled)]
    agreeing = where_labels_agree(scores, labels)
    return replace(
        table,
        prompt_index=labelled,
        scores=agreeing,
        num_excused=int((~np.isfinite(agreeing) & (np.isfinite(scores) | ~np.isfinite(labels))).sum()),
        num_disagreeing=int(num_disagreements(scores, labels).sum()) // 2,
    )


def write_stages(
    table: ScoreTable,
    output_dir: Path,
    *,
    schedule: Schedule,
    pairs_per_stage: int,
    max_bad_fraction: float,
    seed: int,
) -> tuple[dict[str, int], list[str]]:
    """Write `3-stages`: pairs, description and prompt counts of each stage.

    Args:
        output_dir: folder of the step.
        pairs_per_stage: number of draws per stage.
        max_bad_fraction: maximum share of non-finite scores.
        seed: seed of the run.

    Returns:
        Counts and warnings for the manifest.

    Raises:
        CurriculumError: if too many scores are not finite, a stage has no pair, or no stage after the first has new
            pairs.
    """
    ranking = rank_samples(table.scores)
    num_bad = int(ranking.num_unranked.sum()) - table.num_excused
    if num_bad > max_bad_fraction * table.scores.size:
        raise CurriculumError(
            f"{num_bad} of {table.scores.size} scores are not finite, more than `rewards.max_bad_fraction`"
            f" = {max_bad_fraction}; fix the reward, or the cause of images without a score"
        )
    curriculum = Curriculum(ranking, schedule, seed=seed, gap_noise=table.gap_noise)
    extent = curriculum.formed.extent
    stages = []
    for stage in range(1, schedule.num_stages + 1):
        drawn, admitted = curriculum.plan(stage, pairs_per_stage)
        pairs = sort_by_difficulty(drawn)
        make_folder(output_dir / f"stage-{stage}")
        write_table(_rows(pairs, stage, table), output_dir / f"stage-{stage}" / "pairs-000000.parquet")
        described = describe_stage(curriculum, stage, admitted, pairs)
        stages.append(described)
        num_new = described["num_new_pairs"]
        log.info(
            "stage %d/%d: rank gaps %d to %d, %d pairs of %d prompts admitted%s, %d drawn",
            stage, schedule.num_stages, described["min_rank_gap"], described["max_rank_gap"],
            admitted.num_pairs, admitted.num_prompts, "" if num_new is None else f" ({num_new} in the new level)",
            len(pairs),
        )  # fmt: skip
        _write_prompt_counts(pairs, table.prompt_index, admitted, output_dir / f"prompts-{stage}.parquet")
    warnings = curriculum.empty_levels()
    write_json(output_dir / "stages.json", stages)
    counts = {
        "pairs_drawn": schedule.num_stages * pairs_per_stage,
        "stages_without_new_pairs": len(warnings),
        "scores_not_finite": num_bad,
        "pairs_disagreeing_with_label": table.num_disagreeing,
        "prompts_without_pairs": int(np.count_nonzero(extent.pairs_per_prompt == 0)),
    }
    if table.gap_noise is not None:
        all_pairs = AdmittedPairs(ranking, schedule.min_rank_gap, min_score_gap=schedule.min_score_gap)
        counts["pairs_drawn_within_noise"] = sum(stage["num_drawn_within_noise"] for stage in stages)
        counts["pairs_dropped_as_noise"] = all_pairs.num_pairs - curriculum.formed.num_pairs
    return counts, warnings


def _read(scores_dir: Path, rewards: Iterable[str], *, second: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Prompt indices ``[prompt]`` and scores ``[prompt, sample, reward]``."""
    found = [read_scores(scores_dir / score_file(name, second=second), name) for name in rewards]
    return found[0][0], np.stack([scores for _, scores in found], axis=2)


def _rows(pairs: PairArrays, stage: int, table: ScoreTable) -> pa.Table:
    within_noise = pa.nulls(len(pairs), pa.bool_()) if table.gap_noise is None else pairs.score_gap <= table.gap_noise
    return pa.table(
        {
            "stage": np.full(len(pairs), stage),
            "draw": pairs.draw,
            "prompt_index": table.prompt_index[pairs.prompt],
            "chosen": pairs.chosen,
            "rejected": pairs.rejected,
            "rank_gap": pairs.rank_gap,
            "score_gap": pairs.score_gap,
            "within_noise": within_noise,
        }
    )


def _write_prompt_counts(pairs: PairArrays, prompt_index: np.ndarray, admitted: PairSet, path: Path) -> None:
    drawn = np.bincount(pairs.prompt, minlength=len(prompt_index))
    counts = {"prompt_index": prompt_index, "num_candidate_pairs": admitted.pairs_per_prompt, "num_drawn_pairs": drawn}
    write_table(pa.table(counts), path)

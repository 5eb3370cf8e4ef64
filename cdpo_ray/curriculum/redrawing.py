"""Implicit rewards of the policy -> pairs of one stage, drawn by their margins."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.curriculum.dataset import ScoreTable
from cdpo_ray.curriculum.explanation import describe_stage
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.reliability import margin_reliability
from cdpo_ray.curriculum.schedule import Curriculum, Schedule

Draws = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def redraw_stage(
    table: ScoreTable,
    schedule: Schedule,
    values: NDArray[np.float32],
    row_of_prompt: NDArray[np.int64],
    *,
    stage: int,
    num_pairs: int,
    seed: int,
) -> tuple[Draws, dict[str, Any]]:
    """Draw the pairs of a stage by the policy's margins; a pure function, so that all workers agree.

    Args:
        values: ``[draw, prompt, sample]``, implicit rewards in nats, by row of the sample table; a margin is the mean
            over the draws.
        row_of_prompt: ``[prompt_index]``, row of each prompt in the sample table.
        stage: number of the stage, from 1.
        num_pairs: number of draws.
        seed: seed of the run.

    Returns:
        Prompt row, chosen and rejected, ``[pair]`` each; and the description of the stage.
    """
    rows = row_of_prompt[table.prompt_index]
    values = values[:, rows]
    curriculum = Curriculum(
        rank_samples(table.scores), schedule, seed=seed, values=values.mean(axis=0), gap_noise=table.gap_noise
    )
    pairs, admitted = curriculum.plan(stage, num_pairs)
    reliability = margin_reliability(values, curriculum.formed)
    description = describe_stage(curriculum, stage, admitted, pairs, margin_reliability=reliability)
    return (rows[pairs.prompt], pairs.chosen, pairs.rejected), description

"""Pairs of a stage drawn by the policy's margins."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from cdpo_ray.curriculum.combination import RankingRule
from cdpo_ray.curriculum.dataset import read_ranking_scores
from cdpo_ray.curriculum.noise import gap_noise
from cdpo_ray.curriculum.pairs import AdmittedPairs
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.redrawing import redraw_stage
from cdpo_ray.curriculum.reliability import margin_reliability
from cdpo_ray.curriculum.schedule import Schedule
from cdpo_ray.records import score_column, score_file
from cdpo_ray.rewards.score_table import write_scores


def test_pairs_drawn_by_margin_use_the_combined_scores_and_exceed_their_noise(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    first = random.normal(size=(6, 5, 2))
    second = first + 0.2 * random.normal(size=first.shape)
    for place, reward in enumerate(("a", "b")):
        for scores, again in ((first, False), (second, True)):
            lists = {"prompt_index": np.arange(6), "prompt_id": ["id"] * 6}
            lists[score_column(reward)] = scores[:, :, place].tolist()
            write_scores(pa.table(lists), reward, tmp_path / score_file(reward, second=again))
    rule = RankingRule("weighted_sum", {"a": 1.0, "b": -0.5}, with_noise=True)
    schedule = Schedule(num_stages=2, measure="margin", boundaries="equal_count", min_gap_in_noise=1.5)
    row_of_prompt = np.array([5, 4, 3, 2, 1, 0])
    values = random.normal(size=(4, 6, 5)).astype(np.float32)
    draws, described = redraw_stage(
        read_ranking_scores(tmp_path, rule), schedule, values, row_of_prompt, stage=2, num_pairs=200, seed=0
    )

    combined, noise = rule.combine(first), gap_noise(rule.combine(first), rule.combine(second))
    above = {
        (int(row_of_prompt[prompt]), w, lost)
        for prompt in range(6)
        for w in range(5)
        for lost in range(5)
        if combined[prompt, w] - combined[prompt, lost] > 1.5 * noise
    }
    drawn = {tuple(map(int, pair)) for pair in zip(*draws, strict=True)}
    assert drawn <= above and len(drawn) > len(above) / 2
    assert described["num_candidate_pairs"] == len(above)
    rows = row_of_prompt[np.arange(6)]
    formed = AdmittedPairs(rank_samples(combined), min_score_gap=1.5 * noise)
    assert described["margin_reliability"] == margin_reliability(values[:, rows], formed) is not None
    assert described["num_drawn_within_noise"] == 0 and described["gap_noise"] == noise

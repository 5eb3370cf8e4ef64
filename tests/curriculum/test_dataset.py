"""The score table of the pairs step."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray.curriculum.combination import RankingRule
from cdpo_ray.curriculum.dataset import read_ranking_scores, write_stages
from cdpo_ray.curriculum.noise import gap_noise
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.errors import CurriculumError
from cdpo_ray.records import score_column, score_file
from cdpo_ray.rewards.score_table import write_scores


def test_pairs_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    prompts, samples = np.repeat([3, 4, 8, 11], 6), np.tile(np.arange(6), 4)
    table = pa.table({"prompt_index": prompts, "sample_index": samples, "score_clip": random.normal(size=24)})
    drawn = []
    for name, order in (("in_order", np.arange(24)), ("mixed", random.permutation(24))):
        (tmp_path / name).mkdir()
        pq.write_table(table.take(order), tmp_path / name / "clip.parquet")
        read = read_ranking_scores(tmp_path / name, RankingRule("clip", {"clip": 1.0}))
        assert read.prompt_index.tolist() == [3, 4, 8, 11]
        pairs, _ = Curriculum(rank_samples(read.scores), Schedule(), seed=0).plan(4, 100)
        columns = read.prompt_index[pairs.prompt], pairs.chosen, pairs.rejected, pairs.rank_gap
        drawn.append([column.tolist() for column in columns])
    assert drawn[0] == drawn[1]
    scores = dict(
        zip(zip(prompts.tolist(), samples.tolist(), strict=True), table["score_clip"].to_pylist(), strict=True)
    )
    assert all(scores[p, w] > scores[p, lost] for p, w, lost, _ in zip(*drawn[0], strict=True))


def write_table(folder: Path, reward: str, scores: np.ndarray, *, second: bool = False) -> None:
    """Write scores ``[prompt, sample]`` of prompts 0, 1, ... in the format of the score step."""
    prompts = pa.table({"prompt_index": np.arange(len(scores)), "prompt_id": ["an id"] * len(scores)})
    prompts = prompts.append_column(score_column(reward), pa.array(scores.tolist(), pa.list_(pa.float64())))
    write_scores(prompts, reward, folder / score_file(reward, second=second))


def test_ranking_scores_are_combined_from_the_files_of_their_rewards_only(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(size=(5, 6, 2))
    scores[2, 3, 1] = np.nan
    for place, name in enumerate(("clip", "own:reward")):
        write_table(tmp_path, name, scores[:, :, place])
    rule = RankingRule("weighted_sum", {"clip": 1.0, "own:reward": -0.5})
    read = read_ranking_scores(tmp_path, rule)
    np.testing.assert_array_equal(read.scores, rule.combine(scores))
    assert np.isnan(read.scores).sum() == 1 and read.gap_noise is None
    single = read_ranking_scores(tmp_path, RankingRule("own:reward", {"own:reward": 1.0}))
    np.testing.assert_array_equal(single.scores, scores[:, :, 1])


def test_the_noise_is_that_of_the_ranking_scores_on_prompts_scored_twice(tmp_path: Path) -> None:
    first = np.random.default_rng(0).normal(size=(5, 6, 2))
    second = first[:3] + 0.1 * np.random.default_rng(1).normal(size=(3, 6, 2))
    for place, name in enumerate(("a", "b")):
        write_table(tmp_path, name, first[:, :, place])
        write_table(tmp_path, name, second[:, :, place], second=True)
    rule = RankingRule("mean_rank", {"a": 1.0, "b": 1.0}, with_noise=True)
    expected = gap_noise(rule.combine(first)[:3], rule.combine(second))
    assert read_ranking_scores(tmp_path, rule).gap_noise == expected > 0
    write_table(tmp_path, "b", np.full((3, 6), np.nan), second=True)
    with pytest.raises(CurriculumError, match=r"so the noise is unknown; raise `rewards.noise_prompts`, or fix"):
        read_ranking_scores(tmp_path, rule)


LABELLED = RankingRule("clip", {"clip": 1.0}, with_labels=True)


def write_labels(folder: Path, labels: dict[int, list[float]]) -> None:
    """Write labels of training prompts."""
    prompts = pa.table({"prompt_index": list(labels), "prompt_id": ["an id"] * len(labels)})
    prompts = prompts.append_column(score_column("label"), pa.array(labels.values(), pa.list_(pa.float64())))
    write_scores(prompts, "label", folder / score_file("label"))


def test_labelled_pairs_are_ranked_only_if_they_agree_and_are_not_held_out(tmp_path: Path) -> None:
    nan = np.nan
    write_table(tmp_path, "clip", np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.5, 0.5], [nan, 0.2], [0.2, 0.8]]))
    write_labels(tmp_path, {0: [1, 0], 1: [0, 1], 3: [1, 0], 4: [1, 0], 5: [0, 1]})  # 2 is held out
    read = read_ranking_scores(tmp_path, LABELLED)
    assert read.prompt_index.tolist() == [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(read.scores, [[0.9, 0.1], [nan, nan], [nan, nan], [nan, nan], [0.2, 0.8]])
    assert read.num_disagreeing == 2  # rows 1 and 3; row 4 has no score to disagree
    assert int(rank_samples(read.scores).num_unranked.sum()) - read.num_excused == 1  # the missing score


def test_a_row_of_three_images_does_not_exempt_rows_of_two_from_agreeing(tmp_path: Path) -> None:
    nan = np.nan
    write_table(tmp_path, "clip", np.array([[0.1, 0.9, nan], [0.9, 0.1, nan], [0.9, 0.1, 0.5]]))
    write_labels(tmp_path, {0: [1, 0, nan], 1: [1, 0, nan], 2: [2, 1, 0]})  # padded to the most images
    read = read_ranking_scores(tmp_path, LABELLED)
    np.testing.assert_array_equal(read.scores, [[nan, nan, nan], [0.9, 0.1, nan], [0.9, nan, 0.5]])
    assert read.num_disagreeing == 2
    assert int(rank_samples(read.scores).num_unranked.sum()) - read.num_excused == 0


def test_missing_images_of_a_ranked_folder_are_not_ranked_and_no_reward_is_blamed(tmp_path: Path) -> None:
    nan = np.nan
    write_table(tmp_path, "clip", np.array([[0.0, -1.0, -2.0], [0.0, -1.0, 7.0]]))
    write_labels(tmp_path, {0: [0, -1, -2], 1: [0, -1, nan]})  # the third image of prompt 1 is padding
    read = read_ranking_scores(tmp_path, LABELLED)
    np.testing.assert_array_equal(read.scores, [[0, -1, -2], [0, -1, nan]])
    assert (read.num_excused, read.num_disagreeing) == (1, 0)
    assert rank_samples(read.scores).num_ranked.tolist() == [3, 2]


@pytest.mark.parametrize("missing", [np.nan, np.inf, None])
def test_too_many_samples_without_a_score_of_one_reward_stop_a_run(missing: float | None, tmp_path: Path) -> None:
    write_table(tmp_path, "a", np.random.default_rng(0).normal(size=(5, 6)))
    holes = np.random.default_rng(1).normal(size=(5, 6)).astype(object)
    holes[:3, 1] = missing
    write_table(tmp_path, "b", holes)
    table = read_ranking_scores(tmp_path, RankingRule("pareto", {"a": 1.0, "b": 1.0}))
    with pytest.raises(CurriculumError, match=r"3 of 30 scores are not finite, more than `rewards.max_bad_fraction`"):
        write_stages(table, tmp_path, schedule=Schedule(), pairs_per_stage=1, max_bad_fraction=0.09, seed=0)
    assert rank_samples(table.scores).num_unranked.tolist() == [1, 1, 1, 0, 0]


def test_a_stage_that_adds_no_pair_is_logged_counted_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_table(tmp_path, "clip", np.array([[0.0, 2.0, 6.0]]))  # gaps 2, 4 and 6: the third of four levels is empty
    table = read_ranking_scores(tmp_path, RankingRule("clip", {"clip": 1.0}))
    schedule = Schedule(num_stages=4, measure="score_gap")
    counts, warnings = write_stages(
        table, tmp_path / "stages", schedule=schedule, pairs_per_stage=5, max_bad_fraction=0, seed=0
    )
    described = json.loads((tmp_path / "stages" / "stages.json").read_text())
    assert [stage["num_new_pairs"] for stage in described] == [1, 1, 0, 1]
    assert [stage["num_candidate_pairs"] for stage in described] == [1, 2, 2, 3]
    assert counts["stages_without_new_pairs"] == len(warnings) == 1
    assert warnings[0].startswith("stage 3 admits no pair that earlier stages do not")
    assert "stage 3/4: rank gaps 1 to 2, 2 pairs of 1 prompts admitted (0 in the new level), 5 drawn" in caplog.text

"""Descriptions of stages against hand-computed values."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from brute_force import formed_pairs, rows
from PIL import Image

from cdpo_ray.curriculum.explanation import describe_stage, stages_table
from cdpo_ray.curriculum.figures import draw_stages
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum, Schedule
from cdpo_ray.errors import StoreError

SCORES = np.array([[0.0, 1.0, 3.0, 7.0], [5.0, 5.0, 5.0, 5.0], [2.0, 2.0, 2.0, 4.0]])


def described(schedule: Schedule, num_draws: int = 50, gap_noise: float | None = None) -> list[dict[str, Any]]:
    curriculum = Curriculum(rank_samples(SCORES), schedule, seed=0, gap_noise=gap_noise)
    stages = []
    for stage in range(1, schedule.num_stages + 1):
        drawn, admitted = curriculum.plan(stage, num_draws)
        stages.append(describe_stage(curriculum, stage, admitted, drawn))
    return stages


def test_the_description_of_a_stage_equals_hand_counts() -> None:
    first, second, last = described(Schedule(num_stages=3, label_noise=0.5))
    assert (first["levels"], last["levels"]) == ([1, 1], [1, 3])
    assert (first["min_rank_gap"], first["max_rank_gap"]) == (3, 3)
    assert (first["min_score_gap"], first["max_score_gap"]) == (2.0, 7.0)
    assert first["num_candidate_pairs"] == first["num_distinct_pairs"] == 2  # a swapped pair is the same pair
    assert last["num_candidate_pairs"] == len(formed_pairs(SCORES)) == last["num_distinct_pairs"] == 9
    assert [stage["num_new_pairs"] for stage in (first, second, last)] == [2, 3, 4]
    assert (last["min_score_gap"], last["max_score_gap"]) == (1.0, 7.0)
    assert (last["num_prompts"], last["num_prompts_drawn"], last["num_prompts_of_run"]) == (2, 2, 3)
    assert sum(last["drawn_by_rank_gap"].values()) == sum(last["drawn_by_score_gap"]) == last["num_drawn_pairs"] == 50
    assert last["score_gap_edges"][0] == 0.0 and last["score_gap_edges"][-1] == 7.0


def test_quantiles_of_the_drawn_score_gaps_are_elements_of_the_sorted_list() -> None:
    schedule = Schedule(num_stages=3)
    drawn, _ = Curriculum(rank_samples(SCORES), schedule, seed=0).plan(3, 101)
    stage = described(schedule, 101)[2]
    in_order = sorted(drawn.score_gap.tolist())
    assert stage["score_gap_quantiles"] == {"0.05": in_order[5], "0.25": in_order[25], "0.5": in_order[50],
                                            "0.75": in_order[75], "0.95": in_order[95]}  # fmt: skip


def test_the_table_has_one_line_per_stage_in_columns() -> None:
    stages = described(Schedule(num_stages=3))
    head, *lines = stages_table(stages).split("\n")
    medians = [f"{stage['score_gap_quantiles']['0.5']:g}" for stage in stages]
    assert len(lines) == 3 and len({len(line) for line in (head, *lines)}) == 1
    assert lines[0].split() == f"1 1 3 2 to 7 {medians[0]} 2 2 50 2 2 of 3".split()
    assert lines[2].split() == f"3 1 to 3 1 to 3 1 to 7 {medians[2]} 9 4 50 9 2 of 3".split()
    plain = stages_table(described(Schedule(num_stages=1, order="none"))).split("\n")[1]
    assert plain.split()[-7:] == ["9", "-", "50", "9", "2", "of", "3"]


def test_pairs_within_the_noise_are_counted_if_it_was_measured() -> None:
    stages = described(Schedule(num_stages=3), gap_noise=2.0)
    small = [pair for pair in formed_pairs(SCORES) if pair[4] <= 2.0]
    drawn, _ = Curriculum(rank_samples(SCORES), Schedule(num_stages=3), seed=0).plan(3, 50)
    within = sum((prompt, w, r) in {pair[:3] for pair in small} for prompt, w, r, *_ in rows(drawn))
    assert stages[2]["num_drawn_within_noise"] == within > 0
    head, *_, last = stages_table(stages).split("\n")
    assert head.endswith("  within noise 2") and last.split()[-1] == str(within)
    assert described(Schedule(num_stages=3))[2]["num_drawn_within_noise"] is None


def test_the_chart_grows_with_the_stages_and_shows_differences(tmp_path: Path) -> None:
    sizes, pixels = [], []
    for name, schedule in {
        "two": Schedule(num_stages=2),
        "three": Schedule(num_stages=3),
        "reverse": Schedule(num_stages=3, order="hard_to_easy"),
    }.items():
        draw_stages(described(schedule), tmp_path / f"{name}.png", title="a title")
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes.append(picture.size)
            pixels.append(picture.tobytes())
    assert sizes[0][1] < sizes[1][1] and sizes[1] == sizes[2]
    assert pixels[1] != pixels[2]


def test_fault_55_a_chart_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match=r"stages\.png: cannot be written: Disk quota exceeded"):
        draw_stages(described(Schedule(num_stages=2)), tmp_path / "stages.png", title="a title")
    assert not list(tmp_path.iterdir())

"""The judge `people`, against closed forms and counts over single votes."""

import math
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rated_runs import rated_run, vote_on
from test_report import build_run

from cdpo_ray.errors import StoreError
from cdpo_ray.evaluation.people import Votes, lines_of, measure_people, people_of
from cdpo_ray.evaluation.report import write_report
from cdpo_ray.evaluation.votes import rated_images, votes_path, write_votes
from cdpo_ray.records import EVALUATION, HELDOUT, SAMPLES
from cdpo_ray.store import RunFolder


def measured(tuned: Any, left: Any = None, **judged: Any) -> dict[str, Any]:
    """`measure_people` of ``[voter, prompt, image]`` votes."""
    tuned = np.array(tuned, dtype=float)
    voters = [f"voter{number}" for number in range(len(tuned))]
    votes = Votes(voters, tuned, tuned if left is None else np.array(left, dtype=float))
    return measure_people(votes, {name: np.array(each, dtype=float) for name, each in judged.items()}, seed=0)


def test_of_one_voter_the_win_rate_is_the_share_of_votes_and_a_tie_counts_one_half() -> None:
    tuned = [1] * 9 + [-1] * 2 + [0] * 3
    people = measured([[[each] for each in tuned]])
    assert people["comparison"]["win_rate"]["mean"] == pytest.approx((9 + 1.5) / 14)
    assert people["comparison"]["tuned"]["mean"] == pytest.approx((9 + 1.5) / 14)
    assert people["comparison"]["base"]["mean"] == pytest.approx((2 + 1.5) / 14)
    assert (people["num_votes"], people["num_ties"], people["num_prompts"]) == (14, 3, 14)
    assert people["between_voters"] is None and people["voters"]["voter0"]["agreement"] is None


def test_the_interval_of_the_win_rate_is_that_of_a_binomial_share_over_prompts() -> None:
    tuned = np.where(np.arange(400) < 300, 1.0, -1.0)
    found = measured(tuned[None, :, None])["comparison"]["win_rate"]
    reach = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert found["low"] == pytest.approx(0.75 - reach, abs=0.004)
    assert found["high"] == pytest.approx(0.75 + reach, abs=0.004)


def test_prompts_count_alike_however_many_of_their_images_were_rated() -> None:
    nan = math.nan
    people = measured([[[1, 1, 1, 1], [-1, nan, nan, nan], [nan, nan, nan, nan]]])
    assert people["comparison"]["win_rate"]["mean"] == 0.5
    assert people["num_prompts"] == 2 and people["comparison"]["num_missing"] == 7
    assert "at least 10 prompts, got 2" in people["comparison"]["win_rate"]["no_interval"]


def test_scores_of_several_voters_are_shares_of_votes_and_agreement_counts_equal_votes() -> None:
    rng = np.random.default_rng(0)
    tuned = rng.choice([1, 0, -1, math.nan], size=(4, 15, 2), p=[0.4, 0.1, 0.2, 0.3])
    oracle = rng.choice([1.5, -0.5, 0.0, math.nan], size=(15, 2))
    people = measured(tuned, oracle=oracle)
    shares, alike, with_oracle = [], [], []
    for prompt in range(15):
        here: list[list[float]] = [[], [], []]
        for image in range(2):
            votes = [vote for vote in tuned[:, prompt, image] if not math.isnan(vote)]
            if votes:
                here[0].append(sum((vote + 1) / 2 for vote in votes) / len(votes))
            decided = [
                (voter, tuned[voter, prompt, image]) for voter in range(4) if abs(tuned[voter, prompt, image]) == 1
            ]
            for voter, vote in decided:
                others = [other == vote for number, other in decided if number != voter]
                here[1] += [sum(others) / len(others)] if others else []
                order = oracle[prompt, image]
                here[2] += [] if math.isnan(order) else [0.5 if order == 0 else float((order > 0) == (vote > 0))]
        for values, found in zip((shares, alike, with_oracle), here, strict=True):
            values += [sum(found) / len(found)] if found else []
    assert people["comparison"]["tuned"]["mean"] == pytest.approx(np.mean(shares))
    assert people["between_voters"]["mean"] == pytest.approx(np.mean(alike))
    assert people["agreement"]["oracle"]["mean"] == pytest.approx(np.mean(with_oracle))


@pytest.mark.parametrize(("one", "other"), product((1, -1), repeat=2))
def test_two_voters_agree_wholly_or_not_at_all_on_one_pair(one: int, other: int) -> None:
    people = measured([[[one]], [[other]]], clip=[[3.0]])
    assert people["between_voters"]["mean"] == people["voters"]["voter1"]["agreement"]["mean"] == float(one == other)
    assert people["agreement"]["clip"]["mean"] == (2 + one + other) / 4
    assert people["voters"]["voter1"]["win_rate"]["mean"] == (1 + other) / 2


def test_a_planted_preference_for_the_left_is_measured_without_ties() -> None:
    tuned = np.where(np.arange(40) % 2 == 0, 1.0, -1.0)[None, :, None]
    left = np.where(np.arange(40) < 36, 1.0, -1.0)[None, :, None]
    left[0, 0] = tuned[0, 0] = 0.0
    found = measured(tuned, left)["left"]
    assert found["mean"] == pytest.approx(35 / 39) and found["low"] > 0.5


def test_ties_alone_give_a_win_rate_of_one_half_and_no_agreement() -> None:
    people = measured(np.zeros((2, 12, 1)), clip=np.ones((12, 1)))
    assert people["comparison"]["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert people["left"] is people["between_voters"] is people["agreement"]["clip"] is None
    assert lines_of(people)[1:4] == [
        "agreement with people, chance is 50 %: clip –",
        "left image preferred: –; far from 50 %, voters favour a side",
        "agreement between voters: –",
    ]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A finished run with other samples and another evaluation."""
    folder = build_run(tmp_path / "run")
    for step in (SAMPLES, EVALUATION):
        shutil.rmtree(folder / step)
    return RunFolder(rated_run(folder))


def rate(run: RunFolder, better: str, *, voter: str = "ana", number: int = 12) -> Path:
    """Votes for the images of one arm on the first pairs, each of another prompt; returns the folder of votes."""
    images, votes_dir = rated_images(run, HELDOUT), run.path / "votes"
    votes = [vote_on(images, place, better, voter=voter) for place in range(number)]
    write_votes(votes_path(votes_dir, HELDOUT, voter), votes)
    return votes_dir


def test_votes_of_a_run_are_compared_with_its_judges(run: RunFolder) -> None:
    people = people_of(run, rate(run, "tuned"))
    assert people is not None
    assert people["comparison"]["win_rate"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert people["comparison"]["num_missing"] == 12
    assert people["agreement"]["oracle"]["mean"] == 0.5, "even prompts"
    assert people["agreement"]["clip"]["mean"] == pytest.approx((11 + 0.5) / 12), "equal scores of the first prompt"
    images = rated_images(run, HELDOUT)
    swapped = sum(images.swapped(pair, "ana") for pair in images.pairs[:12])
    assert people["left"]["mean"] == pytest.approx(swapped / 12), "the fine-tuned image is the second of a pair"


def page_of(run: RunFolder, people: dict[str, Any] | None) -> str:
    write_report(run.path, run.path / "report.html", people=people)
    return (run.path / "report.html").read_text(encoding="utf-8")


def test_the_report_has_people_as_a_judge_and_a_section_about_the_voters(run: RunFolder) -> None:
    rate(run, "base", voter="ben", number=6)
    page = page_of(run, people_of(run, rate(run, "base")))
    assert "people 1.0 → 0.0, −1.0 [−1.0, −1.0], win rate 0 %: got worse <small>held out</small>" in page
    assert '<td>people</td><td class="text">held out</td>' in page and "<h2>People</h2>" in page
    assert "18 votes on 12 prompts by 2\nvoters" in page
    assert "<tr><td>ben</td><td>6</td><td>0</td><td>0 % [no interval]</td>" in page
    assert "Signs of reward hacking" in page and "people got worse" in page, "clip rose, which was trained on"


def test_the_report_without_votes_does_not_mention_people(run: RunFolder) -> None:
    assert people_of(run, run.path / "votes") is None
    page = page_of(run, None)
    assert "people" not in page.lower()


def test_fault_52_a_damaged_file_of_votes_is_named_and_nothing_is_measured(run: RunFolder) -> None:
    path = rate(run, "tuned") / HELDOUT / "ana.jsonl"
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(StoreError, match=r"ana\.jsonl: line 13: is damaged .*; delete these lines, or the file"):
        people_of(run, run.path / "votes")


def test_votes_on_other_images_are_counted_apart(run: RunFolder) -> None:
    votes_dir = rate(run, "tuned")
    images = rated_images(run, HELDOUT)
    other = vote_on(images, 12, "tuned") | {"left_digest": "0" * 32}
    path = votes_path(votes_dir, HELDOUT, "ana")
    write_votes(path, [*(vote_on(images, place, "tuned") for place in range(12)), other])
    people = people_of(run, votes_dir)
    assert people is not None and people["num_other"] == 1 and people["num_votes"] == 12
    assert lines_of(people)[-1] == "votes on images that the run does not have any more, not counted: 1"

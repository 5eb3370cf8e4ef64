"""Comparison of candidates, on synthetic images and scores with known numbers."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.dataflow.images import encode_pixels
from cdpo_ray.errors import EvaluationError
from cdpo_ray.evaluation.appearance_columns import add_appearance
from cdpo_ray.evaluation.candidates import Tried, compare_candidates
from cdpo_ray.evaluation.runs import table_of
from cdpo_ray.records import SAMPLES, SCORES, score_column, score_file
from cdpo_ray.rewards.score_table import write_scores
from cdpo_ray.store import RunFolder, write_table

NUM_PROMPTS, NUM_IMAGES = 12, 2
JUDGES = ("oracle", "jpeg_size")


def scores_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_PROMPTS, NUM_IMAGES))


def tried(folder: Path, name: str, *, seed: int, gain: float = 0.0, without: int | None = None, **facts: Any) -> Tried:
    """A candidate with random images; ``gain`` is added to the oracle's random scores."""
    pixels = np.random.default_rng(seed).integers(0, 256, (NUM_PROMPTS, NUM_IMAGES, 3, 8, 8), dtype=np.uint8)
    prompts = [f"<b>prompt {index}</b>" for index in range(NUM_PROMPTS)]
    rows = pa.table({"prompt_index": range(NUM_PROMPTS), "prompt_id": ["id"] * NUM_PROMPTS, "prompt": prompts})
    rows = encode_pixels(add_appearance(rows.append_column("pixels", tensor_column(pixels))))
    values = {"oracle": scores_of(seed) + gain, "jpeg_size": scores_of(seed + 100)}
    for judge in JUDGES:
        rows = rows.append_column(score_column(judge), pa.array(values[judge].tolist()))
    rows = rows.filter([index != without for index in range(NUM_PROMPTS)])
    run = RunFolder(folder / name)
    with run.writing(SAMPLES, {}, {}, seed=0, resumable=False) as (path, _):
        write_table(rows.drop_columns([score_column(judge) for judge in JUDGES]), path / "samples-0.parquet")
    with run.writing(SCORES, {}, {}, seed=0, resumable=False) as (path, _):
        for judge in JUDGES:
            write_scores(rows, judge, path / score_file(judge))
    return Tried(name, run, **facts)


def compare(
    folder: Path, *candidates: Tried, reference: str = "base", categories: Mapping[str, str] | None = None
) -> dict[str, Any]:
    return compare_candidates(
        candidates, reference, folder, judges=JUDGES, categories=categories or {}, num_resamples=200, seed=0
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("judged")
    base, better = tried(folder, "base", seed=1), tried(folder, "better", seed=1, gain=0.5, trained_on="oracle")
    theirs = tried(folder, "theirs", seed=3, is_paired=False)
    return folder, compare(folder, base, better, theirs)


def test_each_candidate_has_its_difference_to_the_reference(compared: tuple[Path, dict[str, Any]]) -> None:
    _, found = compared
    assert found["arms"] == ["better", "theirs", "base"] and found["num_left_out"] == 0
    difference = found["scores"]["better"]["oracle"]["difference"]
    assert difference["mean"] == pytest.approx(0.5) and difference["low"] == pytest.approx(0.5)
    expected = (scores_of(3) - scores_of(1)).mean()
    assert found["scores"]["theirs"]["oracle"]["difference"]["mean"] == pytest.approx(expected)


def test_images_from_another_noise_are_compared_with_every_image_of_the_prompt(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    _, found = compared
    one, other = scores_of(3), scores_of(1)
    wins = [
        one[prompt, left] > other[prompt, right]
        for prompt in range(NUM_PROMPTS)
        for left, right in itertools.product(range(NUM_IMAGES), repeat=2)
    ]
    rates = found["win_rates"]["oracle"]
    assert rates[1][2]["mean"] == pytest.approx(np.mean(wins)) and rates[2][1]["mean"] == pytest.approx(
        1 - np.mean(wins)
    )
    assert rates[0][2]["mean"] == 1  # from the same noise: image by image
    assert {run["name"]: run["same_noise"] for run in found["runs"]} == {"better": True, "theirs": False}


def test_the_page_says_which_images_are_from_another_noise_and_text_stays_text(
    compared: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = compared
    page = (folder / "judge.html").read_text(encoding="utf-8")
    assert (
        "2 candidates compared" in page
        and "except those of theirs" in page
        and "significantly better than the base model" in " ".join(page.split())
    )
    assert page.count("<img ") == 8 * 2 * 3 and "<b>prompt" not in page and "&lt;b&gt;prompt" in page
    assert json.loads((folder / "judge.json").read_text()) == found
    header, base, better, theirs = table_of(found).split("\n")
    assert header.split()[-2:] == ["oracle", "jpeg_size"] and base.split()[0] == "base"
    assert better.split()[:2] == ["better", "oracle"] and "(+0.50 [+0.50, +0.50])" in better
    assert theirs.startswith("theirs")


def test_another_reference_has_the_role_of_the_base(tmp_path: Path) -> None:
    candidates = [tried(tmp_path, "base", seed=1), tried(tmp_path, "better", seed=1, gain=0.5)]
    found = compare(tmp_path, *candidates, reference="better")
    assert found["arms"] == ["base", "better"]
    assert found["scores"]["base"]["oracle"]["difference"]["mean"] == pytest.approx(-0.5)
    assert "difference to better" in (tmp_path / "judge.html").read_text(encoding="utf-8")


def test_a_prompt_without_images_of_some_candidate_is_left_out_of_all(tmp_path: Path) -> None:
    candidates = [tried(tmp_path, "base", seed=1), tried(tmp_path, "other", seed=2, without=3)]
    found = compare(tmp_path, *candidates)
    assert found["num_prompts"] == NUM_PROMPTS - 1 and found["num_left_out"] == 1
    kept = [index for index in range(NUM_PROMPTS) if index != 3]
    assert found["scores"]["other"]["oracle"]["base"]["mean"] == pytest.approx(scores_of(1)[kept].mean())
    assert "1 more prompt is left out" in " ".join((tmp_path / "judge.html").read_text(encoding="utf-8").split())


def test_signs_of_reward_hacking_are_named_by_candidate(tmp_path: Path) -> None:
    rewards = {"names": ["oracle"], "rank_by": None}
    facts = {"trained_on": "oracle", "rewards": rewards}
    base = tried(tmp_path, "base", seed=1)
    flat = tried(tmp_path, "flat", seed=1, gain=1.0, **facts)
    assert compare(tmp_path, base, flat)["signs_of_reward_hacking"] == {}
    grey = tried(tmp_path, "grey", seed=1, gain=1.0, **facts)
    worse = -np.abs(scores_of(101)) - 5.0
    path = grey.folder.step(SCORES) / score_file("jpeg_size")
    rows = pa.table({"prompt_index": range(NUM_PROMPTS), "prompt_id": ["id"] * NUM_PROMPTS})
    write_scores(rows.append_column("score_jpeg_size", pa.array(worse.tolist())), "jpeg_size", path)
    found = compare(tmp_path, base, flat, grey)
    assert found["signs_of_reward_hacking"] == {"grey": ["jpeg_size got worse"]}
    page = " ".join((tmp_path / "judge.html").read_text(encoding="utf-8").split())
    assert "grey: signs of reward hacking.</strong> The reward that it was trained on rose significantly, while" in page
    assert "flat: signs" not in page


def test_without_a_common_prompt_or_a_finite_score_there_is_no_comparison(tmp_path: Path) -> None:
    candidates = [tried(tmp_path, "base", seed=1), tried(tmp_path, "nothing", seed=1, gain=float("nan"))]
    with pytest.raises(EvaluationError, match=r"^judge: no image has a finite score of both models"):
        compare(tmp_path, *candidates)


def test_differences_are_broken_down_by_category(tmp_path: Path) -> None:
    candidates = [tried(tmp_path, "base", seed=1), tried(tmp_path, "other", seed=2)]
    candidates.append(tried(tmp_path, "theirs", seed=3, is_paired=False))
    prompts = [f"<b>prompt {index}</b>" for index in range(NUM_PROMPTS)]
    categories = {prompt: "<i>even</i>" if index % 2 == 0 else "odd" for index, prompt in enumerate(prompts[:-1])}
    found = compare(tmp_path, *candidates, categories=categories)
    for name, seed in (("other", 2), ("theirs", 3)):
        even, odd = found["categories"][name]
        assert (even["category"], even["num_prompts"], odd["num_prompts"]) == ("<i>even</i>", 6, 5)
        expected = (scores_of(seed) - scores_of(1))[:-1][1::2].mean()
        assert odd["judges"]["oracle"]["difference"]["mean"] == pytest.approx(expected)
    page = (tmp_path / "judge.html").read_text()
    assert page.count('<td dir="auto">&lt;i&gt;even&lt;/i&gt;</td><td>6</td>') == len(JUDGES) and "<i>even" not in page

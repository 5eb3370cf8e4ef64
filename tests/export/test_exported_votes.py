"""Votes as preferences: read by `cdpo import` without Ray, and by the Hugging Face `datasets`."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from rated_runs import NUM_PROMPTS, image, rated_run, vote_on

from cdpo_ray.cli import main
from cdpo_ray.config import load_config
from cdpo_ray.dataflow.images import decode_png
from cdpo_ray.evaluation.votes import SAMPLED, rated_images, votes_path, write_votes
from cdpo_ray.preferences.files import read_rows, scan
from cdpo_ray.preferences.images import Frame
from cdpo_ray.preferences.pixels import prepared
from cdpo_ray.preferences.rows import PreferenceSource, Row
from cdpo_ray.records import HELDOUT
from cdpo_ray.run import scan_preferences
from cdpo_ray.store import RunFolder

FRAME = Frame(8, 8, max_bytes=10_000_000, max_pixels=50_000_000)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rated_run(tmp_path_factory.mktemp("exported") / "run")


def exported(run: Path, votes: dict[str, list[str]], folder: Path, *, kind: str = HELDOUT) -> list[Row]:
    """Rows that `cdpo import` reads of the votes, by voter: the better image of the first pairs."""
    images = rated_images(RunFolder(run, foreign=True), kind)
    for voter, better in votes.items():
        found = [vote_on(images, place, each, voter=voter) for place, each in enumerate(better)]
        write_votes(votes_path(folder / "votes", kind, voter), found)
    arguments = ["--out", str(folder / "votes"), "--export", str(folder / "made" / "votes.parquet")]
    assert main(["rate", str(run), *arguments, *(["--samples"] if kind == SAMPLED else [])]) == 0
    source = PreferenceSource(str(folder / "made" / "votes.parquet"), "pickapic")
    rows = [row for chunk in scan(source).chunks for row in read_rows(chunk, source)]
    assert all(isinstance(row, Row) for row in rows)
    return [row for row in rows if isinstance(row, Row)]


def test_the_image_with_more_votes_is_preferred_and_has_the_pixels_of_the_run(run: Path, tmp_path: Path) -> None:
    better = ["tuned"] * 8 + ["base"] * 4
    rows = exported(run, {"ana": better}, tmp_path)
    images = rated_images(RunFolder(run), HELDOUT)
    expected = {
        images.prompts[pair.prompt_index]: image(int(better[place] == "tuned"), pair.prompt_index, 0)
        for place, pair in enumerate(images.pairs[:NUM_PROMPTS])
    }
    assert {row.prompt for row in rows} == {*expected}
    chosen_first = 0
    for row in rows:
        group, faults = prepared(row, FRAME, 2)
        assert group is not None and not faults
        chosen = int(np.argmax(row.labels))
        np.testing.assert_array_equal(group[0][chosen], decode_png(expected[row.prompt]))
        chosen_first += chosen == 0
    assert 0 < chosen_first < len(rows), "the place of an image does not say which model made it"


def test_votes_of_several_people_are_shares_and_equal_shares_are_ties(run: Path, tmp_path: Path) -> None:
    votes = {"ana": ["tuned", "tuned", "tie"], "ben": ["tuned", "base"], "eve": ["base"]}
    [row] = exported(run, votes, tmp_path)
    images = rated_images(RunFolder(run), HELDOUT)
    assert row.prompt == images.prompts[images.pairs[0].prompt_index]
    assert sorted(row.labels) == pytest.approx([1 / 3, 2 / 3])
    source = PreferenceSource(str(tmp_path / "made" / "votes.parquet"), "pickapic")
    assert (scan(source).num_rows, scan(source).num_tied) == (3, 2)


def test_samples_of_training_prompts_become_preferences_on_training_prompts(run: Path, tmp_path: Path) -> None:
    rows = exported(run, {"ana": ["sample"] * 5}, tmp_path, kind=SAMPLED)
    images = rated_images(RunFolder(run), SAMPLED)
    assert {row.prompt for row in rows} == {f"train {pair.prompt_index}" for pair in images.pairs[:5]}
    assert all(sorted(row.labels) == [0.0, 1.0] for row in rows)


def test_a_configuration_that_trains_on_votes_alone_is_valid_and_finds_them(run: Path, tmp_path: Path) -> None:
    exported(run, {"ana": ["tuned"] * 10 + ["tie"] * 2}, tmp_path)
    values = yaml.safe_load((Path(__file__).parents[2] / "configs" / "smoke.yaml").read_text())
    del values["prompts"]["train"], values["generation"]["images_per_prompt"]
    values["preferences"] = {"path": str(tmp_path / "made" / "votes.parquet"), "format": "pickapic"}
    values["rewards"] = {"names": ["preference"]}
    values["curriculum"] |= {"measure": "score_gap_quantile"}
    found = scan_preferences(load_config(values), with_images=True)
    assert (found.num_rows, found.num_tied, len(found.prompts), found.faults) == (12, 2, 10, [])


def test_datasets_decodes_the_images(run: Path, tmp_path: Path) -> None:
    exported(run, {"ana": ["tuned"] * 3}, tmp_path)
    file, cache = str(tmp_path / "made" / "votes.parquet"), str(tmp_path / "cache")
    loaded = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=cache)
    assert loaded.num_rows == 3 and loaded[0]["jpg_0"].size == (8, 8) and loaded[0]["num_votes"] == 1

"""Pairs of images that people rate, and the files of their votes."""

import json
import os
import re
from itertools import chain
from pathlib import Path

import pytest
from rated_runs import NUM_IMAGES, NUM_PROMPTS, NUM_SAMPLES, image, rated_run, vote_on

from cdpo_ray.errors import StoreError
from cdpo_ray.evaluation.votes import (
    SAMPLED,
    pair_of,
    rated_images,
    read_all_votes,
    read_votes,
    voted_files,
    votes_path,
    write_votes,
)
from cdpo_ray.records import HELDOUT
from cdpo_ray.store import RunFolder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return RunFolder(rated_run(tmp_path_factory.mktemp("votes") / "run"), foreign=True)


def test_the_first_pairs_cover_all_prompts_and_every_image_is_in_one_pair(run: RunFolder) -> None:
    pairs = rated_images(run, HELDOUT).pairs
    for turn in range(NUM_IMAGES):
        here = pairs[turn * NUM_PROMPTS : (turn + 1) * NUM_PROMPTS]
        assert sorted(pair.prompt_index for pair in here) == list(range(NUM_PROMPTS))
        assert {pair.images for pair in here} == {(f"base-{turn}", f"tuned-{turn}")}
    assert len(pairs) == NUM_PROMPTS * NUM_IMAGES
    assert [pair.prompt_index for pair in pairs[:NUM_PROMPTS]] != list(range(NUM_PROMPTS)), "in random order"


def test_each_voter_sees_about_half_of_the_fine_tuned_images_on_the_left_and_others_than_another_voter(
    run: RunFolder,
) -> None:
    images = rated_images(run, HELDOUT)
    swapped = [[images.swapped(pair, f"voter{number}") for pair in images.pairs] for number in range(50)]
    assert 0.45 < sum(map(sum, swapped)) / (50 * len(images.pairs)) < 0.55
    assert len({tuple(each) for each in swapped}) == 50
    again = rated_images(run, HELDOUT)
    assert again.pairs == images.pairs
    assert [again.swapped(pair, "voter0") for pair in again.pairs] == swapped[0]


def test_samples_are_matched_at_random_and_each_is_in_one_pair_of_its_prompt(run: RunFolder) -> None:
    images = rated_images(run, SAMPLED)
    for prompt in range(NUM_PROMPTS):
        names = list(chain(*(pair.images for pair in images.pairs if pair.prompt_index == prompt)))
        assert len(names) == len(set(names)) == 2 * (NUM_SAMPLES // 2)
        assert images.prompts[prompt] == f"train {prompt}"
    assert len({pair.images for pair in images.pairs}) > NUM_SAMPLES // 2
    assert images.pngs([2])[2, "sample-3"] == image(2, 2, 3)


def test_samples_without_images_cannot_be_rated(tmp_path: Path) -> None:
    run = RunFolder(rated_run(tmp_path / "run", keep_images=False), foreign=True)
    with pytest.raises(StoreError, match=r"holds latents but no images; `generation.keep_images: true` keeps them"):
        rated_images(run, SAMPLED)


def test_votes_are_read_as_they_were_written_by_voter(run: RunFolder, tmp_path: Path) -> None:
    images = rated_images(run, HELDOUT)
    votes = [vote_on(images, number, "tuned") for number in range(3)]
    write_votes(votes_path(tmp_path, HELDOUT, "ana"), votes)
    write_votes(votes_path(tmp_path, HELDOUT, "ben"), votes[:1])
    assert [pair_of(vote) for vote in votes] == images.pairs[:3]
    assert read_all_votes(tmp_path, images) == ({"ana": votes, "ben": votes[:1]}, 0)
    assert read_votes(votes_path(tmp_path, SAMPLED, "ana")) == []
    assert voted_files(tmp_path, SAMPLED) == {}


def test_votes_on_images_that_were_made_again_do_not_count(run: RunFolder, tmp_path: Path) -> None:
    images = rated_images(run, HELDOUT)
    votes = [vote_on(images, number, "tuned") for number in range(4)]
    votes[1]["left_digest"] = "0" * 32
    votes[2]["prompt_index"] = 1_000_000
    votes[3] |= {"left": "base-0", "right": "base-1"}
    write_votes(votes_path(tmp_path, HELDOUT, "ana"), votes)
    assert read_all_votes(tmp_path, images) == ({"ana": votes[:1]}, 3)


def test_fault_52_all_faults_of_a_file_of_votes_are_named_at_once(run: RunFolder, tmp_path: Path) -> None:
    good = vote_on(rated_images(run, HELDOUT), 0, "tuned")
    wrong: list[object] = [
        good | {"choice": "both\x1b[31m"},
        good,
        good | {"left": "../../etc/passwd", "more": 1},
        good | {"left": good["right"]},
        ["a"],
    ]
    path = tmp_path / "ana.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in [good, *wrong]) + '{"prompt')
    with pytest.raises(StoreError) as raised:
        read_votes(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: line 2: is damaged (`choice`: Input should be 'left', 'right' or 'tie', got")
    assert "line 3: is on the same pair as line 1" in message and "line 4: is damaged (`left`" in message
    assert "line 5: must have two images" in message and "line 6: is damaged" in message
    assert message.endswith("; and 1 more; delete these lines, or the file") and "\x1b" not in message


def test_fault_52_names_of_voters_and_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "heldout").mkdir()
    (tmp_path / "heldout" / "a b.jsonl").touch()
    with pytest.raises(StoreError, match=re.escape("must hold files named after voters, got 'a b'")):
        voted_files(tmp_path, HELDOUT)
    (tmp_path / "heldout" / "a b.jsonl").rename(tmp_path / "heldout" / "ab.jsonl")
    assert [*voted_files(tmp_path, HELDOUT)] == ["ab"]
    (tmp_path / "heldout" / "eve.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match="is a symbolic link that leads out of"):
        voted_files(tmp_path, HELDOUT)


def test_a_pipe_in_place_of_a_file_of_votes_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ana.jsonl")
    with pytest.raises(StoreError, match="not a regular file"):
        read_votes(tmp_path / "ana.jsonl")

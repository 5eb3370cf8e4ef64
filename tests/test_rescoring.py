"""A run that takes the images of another, and what of their scores it takes over; none of it needs Ray."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_runs import config_of

from cdpo_ray.config import Config
from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.errors import StoreError
from cdpo_ray.records import SAMPLES, SCORES, score_column, score_file
from cdpo_ray.rewards.score_table import read_scores, write_scores
from cdpo_ray.run import round_folders
from cdpo_ray.steps import STEPS, Context, Step
from cdpo_ray.store import RunFolder, describe, fingerprint_of

SCORE_LISTS = np.random.default_rng(0).normal(size=(6, 4))


def config_in(folder: Path, name: str, *, samples_from: Path | None = None, **sections: Any) -> Config:
    run = {"name": name, "dir": str(folder), "samples_from": samples_from and str(samples_from)}
    return config_of(folder, "embedded", run=run, **sections)


def step_of(folder: str) -> Step:
    return next(step for step in STEPS if step.folder == folder)


def perform(config: Config, *folders: str) -> RunFolder:
    """Do these steps as `run_steps` does, but for Ray."""
    (run,) = round_folders(config)
    run.path.mkdir(exist_ok=True)
    context = Context(config, None, run)  # type: ignore[arg-type]
    for step in map(step_of, folders):
        settings, inputs = step.settings(config), step.fingerprints(config, run)
        if not run.is_complete(step.folder, settings, inputs, grows=step.grows):
            with run.writing(step.folder, settings, inputs, seed=3, resumable=False, grows=step.grows) as (
                path,
                output,
            ):
                step.perform(context, path, output)
    return run


@pytest.fixture
def source(tmp_path: Path) -> RunFolder:
    """Images scored by `clip` as they were made, and by `jpeg_size` later, which was measured twice."""
    config = config_in(tmp_path, "source", rewards={"names": ["clip", "jpeg_size"], "noise_prompts": 2})
    run = RunFolder(tmp_path / "source")
    run.path.mkdir()
    samples = pa.table({"prompt_index": np.arange(6), "prompt_id": ["an id"] * 6, "prompt": ["a prompt"] * 6})
    samples = samples.append_column("latents", tensor_column(np.zeros((6, 4, 1, 1, 1), np.float32)))
    samples = samples.append_column("score_clip", pa.array(SCORE_LISTS.tolist()))
    with run.writing(SAMPLES, step_of(SAMPLES).settings(config), {}, seed=3, resumable=False) as (path, output):
        for shard in range(2):
            pq.write_table(samples[3 * shard : 3 * shard + 3], path / f"samples-{shard}.parquet")
        output.counts["images"] = 24
        output.details["rewards"] = {"clip": config.rewards.options("clip")}
    later = samples.drop_columns("score_clip").append_column(score_column("jpeg_size"), samples["score_clip"])
    step = step_of(SCORES)
    with run.writing(
        SCORES, step.settings(config), step.fingerprints(config, run), seed=3, resumable=False, grows=True
    ) as (path, _):
        for reward, scored in (("clip", samples), ("jpeg_size", later)):
            write_scores(scored, reward, path / score_file(reward))
            write_scores(scored[:2], reward, path / score_file(reward, second=True))
    return run


def test_images_of_another_run_are_the_same_files_and_their_scores_are_taken_over(
    source: RunFolder, tmp_path: Path
) -> None:
    rewards = {"names": ["jpeg_size", "clip"], "noise_prompts": 2}
    run = perform(config_in(tmp_path, "taken", samples_from=source.path, rewards=rewards), SAMPLES, SCORES)
    for shard in source.manifest(SAMPLES)["files"]:
        assert (run.step(SAMPLES) / shard).samefile(source.step(SAMPLES) / shard)
    assert run.fingerprint(SAMPLES) == source.fingerprint(SAMPLES)
    manifest = run.manifest(SAMPLES)
    assert manifest["counts"] == {"images": 24} and manifest["details"]["taken_from"] == str(source.path)
    assert run.manifest(SCORES)["counts"] == {
        "scores": 48, "scores_computed_now": 0, "not_finite_jpeg_size": 0, "not_finite_clip": 0,
    }  # fmt: skip
    assert run.manifest(SCORES)["details"] == {"noise_jpeg_size": 0, "noise_clip": 0}
    for reward in rewards["names"]:
        np.testing.assert_array_equal(read_scores(run.step(SCORES) / score_file(reward), reward)[1], SCORE_LISTS)


def test_scores_that_came_with_the_images_need_no_judge(source: RunFolder, tmp_path: Path) -> None:
    (source.path / SCORES / "manifest.json").unlink()
    run = perform(config_in(tmp_path, "taken", samples_from=source.path), SAMPLES, SCORES)
    assert run.manifest(SCORES)["counts"] == {"scores": 24, "scores_computed_now": 0, "not_finite_clip": 0}
    prompt_index, scores = read_scores(run.step(SCORES) / "clip.parquet", "clip")
    assert prompt_index.tolist() == [0, 1, 2, 3, 4, 5] and (scores == SCORE_LISTS).all()


def test_images_that_would_be_others_are_refused_with_the_difference(source: RunFolder, tmp_path: Path) -> None:
    changed = config_in(tmp_path, "taken", samples_from=source.path, generation={"guidance_scale": 4.0})
    with pytest.raises(StoreError) as caught:
        perform(changed, SAMPLES)
    assert str(caught.value) == (
        f"`run.samples_from`: {source.path / SAMPLES} was made with `generation.guidance_scale` = 3.0, config says 4.0;"
        " restore the value, or leave out `run.samples_from`"
    )
    with pytest.raises(StoreError, match=r"nowhere/1-samples: is missing or not finished"):
        perform(config_in(tmp_path, "taken", samples_from=tmp_path / "nowhere"), SAMPLES)


def test_damaged_images_are_not_taken(source: RunFolder, tmp_path: Path) -> None:
    (source.path / SAMPLES / "samples-1.parquet").write_bytes(b"other")
    with pytest.raises(StoreError, match=r"source/1-samples/samples-1\.parquet: was altered"):
        perform(config_in(tmp_path, "taken", samples_from=source.path), SAMPLES)


def test_a_ranking_by_what_was_not_scored_names_the_file_that_is_missing(source: RunFolder, tmp_path: Path) -> None:
    config = config_in(tmp_path, "source", rewards={"names": ["clip", "oracle"], "rank_by": "oracle"})
    with pytest.raises(StoreError, match=r"2-scores: has no oracle\.parquet; run the step that makes it first"):
        step_of("3-stages").fingerprints(config, source)
    by_both = {"names": ["clip", "jpeg_size"], "rank_by": "pareto"}
    found = [
        step_of("3-stages").fingerprints(config_in(tmp_path, "source", rewards=rewards), source)[SCORES]
        for rewards in ({"names": ["clip"]}, {"names": ["clip", "jpeg_size"]}, by_both, by_both | {"noise_prompts": 2})
    ]
    assert found[0] == found[1] and len({*found}) == 3


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "settings.json"])
def test_fault_30_samples_that_name_a_file_elsewhere_are_not_taken(
    name: str, source: RunFolder, tmp_path: Path
) -> None:
    (tmp_path / "outside").write_text("mine")
    path = source.path / SAMPLES / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    manifest["fingerprint"] = fingerprint_of(manifest["files"])
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"leads out of the folder|must not name"):
        perform(config_in(tmp_path, "taken", samples_from=source.path), SAMPLES)
    assert (tmp_path / "outside").read_text() == "mine"


def test_fault_30_samples_behind_a_link_out_of_the_run_are_not_taken(source: RunFolder, tmp_path: Path) -> None:
    shard = source.path / SAMPLES / "samples-1.parquet"
    shard.rename(tmp_path / "mine.parquet")
    shard.symlink_to(tmp_path / "mine.parquet")
    with pytest.raises(StoreError, match=r"samples-1\.parquet: is a symbolic link that leads out of"):
        perform(config_in(tmp_path, "taken", samples_from=source.path), SAMPLES)


def test_fault_30_only_a_run_of_ones_own_may_link_to_a_step_of_another(source: RunFolder, tmp_path: Path) -> None:
    linked = RunFolder(tmp_path / "linked")
    linked.path.mkdir()
    (linked.path / SAMPLES).symlink_to(source.path / SAMPLES)
    linked.refuse_damage(SAMPLES)
    with pytest.raises(StoreError, match=r"linked/1-samples: is a symbolic link that leads out of"):
        perform(config_in(tmp_path, "taken", samples_from=linked.path), SAMPLES)


def test_fault_52_samples_and_scores_without_their_columns_are_not_taken(source: RunFolder, tmp_path: Path) -> None:
    perform(config_in(tmp_path, "taken", samples_from=source.path), SAMPLES)
    config = config_in(tmp_path, "taken", samples_from=source.path)
    for table in ({"a": [1]}, {"prompt_index": [1, 1, 2], "sample_index": [0, 1, 0], "score_clip": [0.0, 1.0, 2.0]}):
        pq.write_table(pa.table(table), source.path / SCORES / "clip.parquet")
        described(source.path / SCORES)
        with pytest.raises(StoreError, match=r"clip\.parquet: (prompts )?must have"):
            perform(config, SCORES)
    pq.write_table(pa.table({"a": [1]}), source.path / SAMPLES / "samples-1.parquet")
    described(source.path / SAMPLES)
    with pytest.raises(StoreError, match=r"samples-1\.parquet: has no column `latents`"):
        perform(config_in(tmp_path, "another", samples_from=source.path), SAMPLES)


def described(folder: Path) -> None:
    """Make the manifest true again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: describe(folder / name) for name in manifest["files"]}
    manifest["fingerprint"] = fingerprint_of(manifest["files"])
    (folder / "manifest.json").write_text(json.dumps(manifest))

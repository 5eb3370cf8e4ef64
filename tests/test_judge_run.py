"""`cdpo judge` on a real local Ray: what each candidate's images are, and what is computed when."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from finished_runs import config_of, policy_of, save_policy, write_run
from PIL import Image

from cdpo_ray.config import Config
from cdpo_ray.dataflow.images import decode_png
from cdpo_ray.errors import RewardError
from cdpo_ray.evaluation.report import in_order
from cdpo_ray.export.kohya import write_kohya
from cdpo_ray.export.trained import Trained
from cdpo_ray.judge import judge_candidates
from cdpo_ray.progress.status import run_status
from cdpo_ray.records import CANDIDATES, EVALUATION, SAMPLES, SCORES, TRAINING
from cdpo_ray.run import run_dir_of, run_steps
from cdpo_ray.steps import STEPS
from cdpo_ray.store import RunFolder, read_shards

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
EVALUATED = {
    "images_per_prompt": 2,
    "judges": ["clip", "oracle"],
    "num_margin_draws": 0,
    "num_bootstrap_resamples": 100,
}
SMALL = {"images_per_prompt": 4, "num_denoising_steps": 3, "guidance_scale": 3.0, "images_per_batch": 8}


@dataclass(frozen=True)
class Judged:
    """The same candidates, judged in three calls.

    Attributes:
        evaluated: rows of the run's own evaluation.
        states: after each call, path of each file of `candidates` -> time of its last change, in nanoseconds.
        outputs: what each call that succeeded returned.
    """

    folder: Path
    evaluated: Mapping[str, list[Any]]
    states: list[dict[str, int]]
    outputs: list[list[str]]

    def images(self, name: str) -> list[bytes]:
        rows = read_shards(RunFolder(self.folder / CANDIDATES / name).step(SAMPLES), ["images"])["images"]
        return [png for row in rows.to_pylist() for png in row]


def judging(folder: Path, candidates: dict[str, Any], judges: list[str]) -> Config:
    run = {"name": "judge", "dir": str(folder), "seed": 3}
    evaluation = EVALUATED | {"judges": judges}
    return config_of(
        folder, "embedded", run=run, generation=SMALL, evaluation=evaluation, judge={"candidates": candidates}
    )


def files(folder: Path) -> dict[str, int]:
    every = (path for path in (folder / CANDIDATES).rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder / CANDIDATES)): path.stat().st_mtime_ns for path in every}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    folder = tmp_path_factory.mktemp("judged")
    trained = config_of(folder, "embedded", generation=SMALL, evaluation=EVALUATED)
    write_run(trained, lambda number, path: save_policy(policy_of(trained), path))
    run_steps(trained, STEPS[-1:])
    run_dir = run_dir_of(trained)
    rows = in_order(pq.read_table(run_dir / EVALUATION / "comparison.parquet")).to_pydict()
    (folder / "kohya").mkdir()
    write_kohya(Trained("tuned", run_dir / TRAINING, "stable_diffusion", {"path": "embedded"}), folder / "kohya")
    (folder / "theirs").mkdir()
    with (folder / "theirs" / "metadata.jsonl").open("w") as metadata:
        for number, (png, prompt) in enumerate(zip(rows["base_image"], rows["prompt"], strict=True)):
            Image.open(io.BytesIO(png)).save(folder / "theirs" / f"{number}.webp", lossless=True)
            metadata.write(json.dumps({"file_name": f"{number}.webp", "prompt": prompt}) + "\n")
    candidates: dict[str, Any] = {"tuned": {"run": str(run_dir)}}
    states, outputs = [], []
    with pytest.raises(RewardError, match="broken"):  # after the images of the first candidate
        judge_candidates(judging(folder, candidates, ["clip", "own_rewards:broken"]))
    states.append(files(folder / "judge"))
    candidates |= {"kohya": {"adapter": str(folder / "kohya")}, "theirs": {"images": str(folder / "theirs")}}
    for judges in (["clip", "oracle"], ["clip", "oracle", "jpeg_size"]):
        outputs.append(judge_candidates(judging(folder, candidates, judges)))
        states.append(files(folder / "judge"))
    return Judged(folder / "judge", rows, states, outputs)


def test_images_of_the_base_model_and_of_a_run_are_those_of_the_run_s_evaluation(judged: Judged) -> None:
    assert judged.images("base") == judged.evaluated["base_image"]
    assert judged.images("tuned") == judged.evaluated["tuned_image"]
    assert judged.images("tuned") != judged.images("base")


def test_a_kohya_file_of_a_run_gives_the_run_s_images_up_to_rounding(judged: Judged) -> None:
    run, kohya = (np.stack([decode_png(png) for png in judged.images(name)]).astype(int) for name in ("tuned", "kohya"))
    base = np.stack([decode_png(png) for png in judged.images("base")])
    assert np.abs(run - kohya).max() <= 1 and np.abs(run - base).max() > 10


def test_scores_are_those_of_the_run_s_evaluation_and_images_of_others_are_not_paired(judged: Judged) -> None:
    found = json.loads((judged.folder / "judge.json").read_text())
    for judge in ("clip", "oracle"):
        for arm, mean in (("base", "base"), ("tuned", "tuned")):
            expected = np.mean(judged.evaluated[f"{arm}_score_{judge}"])
            assert found["scores"]["tuned"][judge][mean]["mean"] == pytest.approx(expected, abs=1e-5)
    assert [run["same_noise"] for run in found["runs"]] == [True, True, False]
    theirs = found["scores"]["theirs"]["clip"]  # the same images as the base model's
    assert theirs["difference"]["mean"] == pytest.approx(0, abs=1e-6) and theirs["win_rate"]["mean"] == 0.5


def test_a_call_that_was_interrupted_continues_with_the_images_that_it_had(judged: Judged) -> None:
    first, second, _ = judged.states
    assert {name.split("/")[0] for name in first if name.startswith("base/1-samples/")} == {"base"}
    assert not any("2-scores" in name and "partial" not in name for name in first)
    kept = {name: time for name, time in first.items() if name.startswith("base/1-samples/")}
    assert kept.items() <= second.items()


def test_a_judge_that_is_added_later_generates_nothing(judged: Judged) -> None:
    _, second, third = judged.states
    assert second.items() <= third.items()
    added = {*third} - {*second}
    assert added == {f"{name}/2-scores/jpeg_size.parquet" for name in ("base", "tuned", "kohya", "theirs")}


def test_the_output_is_a_table_and_the_page_and_the_status_is_done(judged: Judged) -> None:
    *_, page = judged.outputs[-1]
    assert page == str(judged.folder / "judge.html")
    text = Path(page).read_text(encoding="utf-8")
    assert "3 candidates compared" in text and text.count("<img ") == 4 * 2 * 4
    assert "jpeg_size" in judged.outputs[-1][0] and "jpeg_size" not in judged.outputs[0][0]
    status = run_status(judged.folder)
    assert status.is_done
    assert [line.split()[:2] for line in status.trials if not line.startswith(" " * 16)] == [
        [f"{CANDIDATES}/{name}/{step}", "done"]
        for name, steps in {
            "base": (SAMPLES, SCORES),
            "kohya": (TRAINING, SAMPLES, SCORES),
            "theirs": (SAMPLES, SCORES),
            "tuned": (SAMPLES, SCORES),
        }.items()
        for step in steps
    ]

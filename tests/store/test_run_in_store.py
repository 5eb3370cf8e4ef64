"""A whole run whose folder is in an object store."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cdpo_ray.cli import main
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS
from cdpo_ray.records import STEP_FOLDERS, TRAINING
from cdpo_ray.search.trials import DONE, Trials
from cdpo_ray.store import RunFolder, local_copy, read_json

WEIGHTS = f"{LORA_DIR}/{LORA_WEIGHTS}"
SMOKE = ["run", str(Path(__file__).parents[2] / "configs" / "smoke.yaml")]


@pytest.mark.ray
@pytest.mark.nightly
def test_a_run_in_a_store_equals_one_on_disk_and_is_skipped_when_it_is_finished(
    s3: Path, tmp_path: Path, embedded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for run_dir in ("s3://bucket/runs", str(tmp_path)):
        assert main([*SMOKE, f"run.dir={run_dir}"]) == 0
    there, here = RunFolder(s3 / "runs" / "smoke"), RunFolder(tmp_path / "smoke")
    differing = []
    for folder in STEP_FOLDERS:
        files = there.manifest(folder)["files"]
        assert set(files) == set(here.manifest(folder)["files"])
        differing += [name for name, described in here.manifest(folder)["files"].items() if files[name] != described]
    # one holds seconds, the other a set of layer names in arbitrary order beside its tensors
    assert set(differing) <= {"stages.json", WEIGHTS}
    ours, theirs = (load_file(local_copy(run.step(TRAINING)) / WEIGHTS) for run in (here, there))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_json(there.path / "5-evaluation" / "metrics.json") == read_json(here.path / "5-evaluation/metrics.json")
    assert "<html" in (there.path / "report.html").read_text()
    caplog.clear()
    assert main([*SMOKE, "run.dir=s3://bucket/runs"]) == 0
    assert caplog.text.count("done already") == len(STEP_FOLDERS) + 1


@pytest.mark.ray
@pytest.mark.nightly
def test_a_search_in_a_store_writes_its_results_there_and_is_skipped_when_it_is_finished(
    s3: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["tune", str(Path(__file__).parents[2] / "configs" / "tune.yaml"), "run.dir=s3://bucket/runs"]
    search += [f"prompts.{side}.count=4" for side in ("train", "validation", "heldout")]
    search += ["generation.num_denoising_steps=2", "search.updates_per_trial=12", "search.num_trials=2"]
    search += ["search.early_prompts=2", "search.confirm_seeds=1"]
    assert main(search) == 0
    output = capsys.readouterr().out
    run = s3 / "runs" / "tune"
    trials = [*Trials(run / "trials").values()]
    assert [trial.number for trial in trials] == [1, 2] and trials[0].state == DONE
    assert all(RunFolder(run / "trials" / trial.name).has(TRAINING) for trial in trials if trial.state == DONE)
    assert "samples_from: s3://bucket/runs/tune" in (run / "best.yaml").read_text()
    assert "<html" in (run / "tune.html").read_text()
    assert main(search) == 0
    assert capsys.readouterr().out == output
    assert [*Trials(run / "trials").values()] == trials

"""A whole run whose folder is in an object store."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cdpo_ray.cli import main
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS
from cdpo_ray.records import STEP_FOLDERS, TRAINING
from cdpo_ray.store import RunFolder, local_copy, read_json

WEIGHTS = f"{LORA_DIR}/{LORA_WEIGHTS}"
SMOKE = ["run", str(Path(__file__).parents[2] / "configs" / "smoke.yaml")]


@pytest.mark.ray
@pytest.mark.nightly
def test_a_run_in_a_store_makes_what_one_on_disk_makes_and_is_passed_over_when_it_is_done(
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
    # one holds seconds, the other a set of layers' names in any order beside its tensors
    assert set(differing) <= {"stages.json", WEIGHTS}
    ours, theirs = (load_file(local_copy(run.step(TRAINING)) / WEIGHTS) for run in (here, there))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_json(there.path / "5-evaluation" / "metrics.json") == read_json(here.path / "5-evaluation/metrics.json")
    assert "<html" in (there.path / "report.html").read_text()
    caplog.clear()
    assert main([*SMOKE, "run.dir=s3://bucket/runs"]) == 0
    assert caplog.text.count("done already") == len(STEP_FOLDERS) + 1

"""A whole run whose folder is in an object store."""

from pathlib import Path

import pytest

from cdpo_ray.cli import main
from cdpo_ray.records import STEP_FOLDERS
from cdpo_ray.store import RunFolder, read_json

SMOKE = ["run", str(Path(__file__).parents[2] / "configs" / "smoke.yaml")]


@pytest.mark.ray
@pytest.mark.nightly
def test_a_run_in_a_store_makes_what_one_on_disk_makes_and_is_passed_over_when_it_is_done(
    s3: Path, tmp_path: Path, embedded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for run_dir in ("s3://bucket/runs", str(tmp_path)):
        assert main([*SMOKE, f"run.dir={run_dir}"]) == 0
    there, here = RunFolder(s3 / "runs" / "smoke"), RunFolder(tmp_path / "smoke")
    timed = {"4-training/stages.json"}  # holds seconds
    for folder in STEP_FOLDERS:
        for name, described in here.manifest(folder)["files"].items():
            assert f"{folder}/{name}" in timed or there.manifest(folder)["files"][name] == described, name
    assert read_json(there.path / "5-evaluation" / "metrics.json") == read_json(here.path / "5-evaluation/metrics.json")
    assert "<html" in (there.path / "report.html").read_text()
    caplog.clear()
    assert main([*SMOKE, "run.dir=s3://bucket/runs"]) == 0
    assert caplog.text.count("done already") == len(STEP_FOLDERS) + 1

"""Outputs within a Ray job's copy of its working folder are refused before any work."""

from pathlib import Path

import pytest
import yaml
from finished_runs import config_of

from cdpo_ray.cli import main
from cdpo_ray.errors import StoreError
from cdpo_ray.store import output_path


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a job, with a config whose `run.dir` is relative."""
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    folder.mkdir(parents=True)
    values = config_of("runs", "embedded").model_dump(mode="json", exclude_unset=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "verb", ["check", "run", "generate", "score", "pairs", "train", "evaluate", "report", "export"]
)
def test_fault_46_each_verb_refuses_a_run_that_would_be_lost_with_the_job(
    verb: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "config.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"StoreError: `run.dir` runs: is {copy}/runs, in this Ray job's copy of")
    assert [path.name for path in copy.iterdir()] == ["config.yaml"]


def test_fault_46_tune_and_other_outputs_refuse_it_too(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = "search={space: {training.beta: [100, 500]}, judge: clip, algorithm: grid}"
    for arguments in (
        ["tune", "config.yaml", "prompts.validation={fraction: 0.5}", search],
        ["compare", "/runs/one", "/runs/two", "--out", "."],
        ["export", "config.yaml", "--out", "exported", "run.dir=/nowhere"],
    ):
        assert main(arguments) == 2
        assert "in this Ray job's copy of the working directory" in capsys.readouterr().err


def test_fault_46_only_a_path_within_the_copy_is_refused(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (copy / "linked").symlink_to(tmp_path / "shared")
    for text in ("linked/runs", str(tmp_path / "runs"), "../../../../runs"):
        assert output_path(text, "run.dir") == Path(text)
    for text in ("runs", "./runs", str(copy / "runs"), "../_ray_pkg_1/runs", "."):
        with pytest.raises(StoreError, match="give an absolute path on storage that all nodes see"):
            output_path(text, "run.dir")

"""`cdpo doctor` finds problems and names a remedy for each."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from finished_runs import config_of

from cdpo_ray import doctor
from cdpo_ray.cli import main
from cdpo_ray.config import load_config
from cdpo_ray.doctor import OK, WARN, WRONG


def test_a_version_below_its_floor_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {result.grade for result in doctor._versions()} == {OK}
    monkeypatch.setitem(doctor.FLOORS, "torch", "99.1")
    monkeypatch.setitem(doctor.FLOORS, "no_such_package", "1")
    wrong = [result.message for result in doctor._versions() if result.grade == WRONG]
    assert len(wrong) == 2 and "fixed in 99.1" in wrong[0] and "no_such_package: not installed" in wrong[1]


@pytest.mark.parametrize(("mode", "grade"), [(0o600, OK), (0o400, OK), (0o644, WRONG), (0o660, WRONG)])
def test_a_token_file_that_others_may_read_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, grade: str
) -> None:
    path = tmp_path / "token"
    path.write_text("canary")
    path.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    (result,) = doctor._token()
    assert result.grade == grade and "canary" not in result.message
    assert ("chmod 600" in result.message) == (grade == WRONG)


def test_only_the_presence_of_the_hub_token_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines = [str(result) for result in doctor._hub()]
    assert lines[0] == "ok     hub token: found" and "canary" not in "".join(lines)


def test_a_run_dir_that_cannot_be_created_is_wrong_and_a_probe_leaves_no_files(tmp_path: Path) -> None:
    assert doctor._storage(config_of(tmp_path / "runs", "embedded")).grade != WRONG
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert doctor._storage(config_of(tmp_path / "file" / "runs", "embedded")).grade == WRONG


def test_a_cluster_that_does_not_answer_is_wrong_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["doctor", "--address", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("wrong  Ray at 127.0.0.1:1: does not answer")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "nonsense"])
def test_fault_34_an_invalid_address_is_wrong(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("wrong  Ray address: must be host:port")


@pytest.mark.parametrize(("gib", "grades"), [(80.0, {OK}), (8.0, {WARN})])
def test_a_gpu_with_too_little_memory_is_a_warning_that_names_what_would_fit(
    monkeypatch: pytest.MonkeyPatch, gib: float, grades: set[str]
) -> None:
    device = SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=gib * 2**30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: device)
    results = list(doctor._memory(load_config(Path(__file__).parents[1] / "configs" / "sd15.yaml")))
    assert {result.grade for result in results} == grades
    assert all(("would fit: `" in result.message) == (gib < 80) for result in results)


def test_memory_is_not_compared_where_there_is_no_gpu() -> None:
    assert list(doctor._memory(config_of("runs", "embedded"))) == []

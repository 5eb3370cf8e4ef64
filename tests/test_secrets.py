"""Secrets in the environment of a run: neither we nor our libraries write any of them to a file or a log."""

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")


@pytest.fixture
def ray_tmp() -> Iterator[Path]:
    """Folder with a short path: paths of Ray's sockets in it must have at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def content(path: Path) -> bytes:
    """Content of a file; tables, which are compressed, as text."""
    return str(pq.read_table(path).to_pydict()).encode() if path.suffix == ".parquet" else path.read_bytes()


def paths_with(secret: str, files: dict[Path, bytes]) -> list[str]:
    return [str(path) for path, content in files.items() if secret.encode() in content]


@pytest.mark.ray
@pytest.mark.nightly
def test_fault_27_no_secret_is_in_the_files_output_and_ray_logs_of_a_run(tmp_path: Path, ray_tmp: Path) -> None:
    canaries = {name: secrets.token_hex(32) for name in SECRETS}
    tracking = ["tracking.wandb.project=smoke", "tracking.wandb.mode=offline"]
    done = subprocess.run(
        [Path(sys.executable).with_name("cdpo"), "-v", "run", "configs/smoke.yaml", f"run.dir={tmp_path}", *tracking],
        env=os.environ | canaries | {"RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(ray_tmp)},
        cwd=ROOT,
        capture_output=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    run, logs = tmp_path / "smoke", next(ray_tmp.glob("cdpo-*/ray/session_2*/logs"))
    files = {path: content(path) for folder in (run, logs) for path in folder.rglob("*") if path.is_file()}
    assert run / "4-training" / "manifest.json" in files and run / "report.html" in files
    assert list(logs.glob("worker-*")) and paths_with("session_2", files), "logs of the run's own Ray, not empty"
    outputs = {Path("stdout"): done.stdout, Path("stderr"): done.stderr}
    assert {name: paths_with(canary, files | outputs) for name, canary in canaries.items()} == {
        name: [] for name in SECRETS
    }

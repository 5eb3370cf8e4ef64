"""Secrets in the environment of a run: none of them is written down, by us or by what we call."""

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
    """Short: the paths of Ray's sockets in it must have no more than 107 characters."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


def content(path: Path) -> bytes:
    """Tables are compressed."""
    return str(pq.read_table(path).to_pydict()).encode() if path.suffix == ".parquet" else path.read_bytes()


def places_of(secret: str, files: dict[Path, bytes]) -> list[str]:
    return [str(path) for path, content in files.items() if secret.encode() in content]


@pytest.mark.ray
@pytest.mark.nightly
def test_fault_27_no_secret_is_in_what_a_run_writes_or_tells_nor_in_rays_logs(tmp_path: Path, ray_tmp: Path) -> None:
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
    assert list(logs.glob("worker-*")) and places_of("session_2", files), "logs of the run's own Ray, not empty"
    told = {Path("stdout"): done.stdout, Path("stderr"): done.stderr}
    assert {name: places_of(canary, files | told) for name, canary in canaries.items()} == {
        name: [] for name in SECRETS
    }

"""The wheel works outside the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UV = Path(sys.executable).with_name("uv")
LOCK = ROOT / "requirements.lock"  # tested versions


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_quickstart_runs_from_a_wheel_in_an_empty_environment(tmp_path: Path) -> None:
    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(UV, "build", "--quiet", "--out-dir", tmp_path, cwd=ROOT)
    [wheel] = tmp_path.glob("*.whl")
    python = tmp_path / "venv" / "bin" / "python"
    run(UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv")
    run(UV, "pip", "install", "--quiet", "--python", python, "--constraints", LOCK, wheel)
    cdpo = python.with_name("cdpo")
    assert "quickstart" in run(cdpo, "configs")
    assert str(tmp_path) in run(python, "-c", "import cdpo_ray; print(cdpo_ray.__file__)")
    printed = run(cdpo, "run", "quickstart")
    assert printed.splitlines()[-1] == "runs/quickstart/report.html"
    assert (tmp_path / "runs" / "quickstart" / "report.html").stat().st_size > 100_000

"""GPU check: its cheapest parts, in its own process on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(out: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)


@pytest.mark.slow
def test_a_rehearsal_measures_the_given_parts_and_writes_the_results(tmp_path: Path) -> None:
    done = check(tmp_path / "check.json", "--tiny", "--parts", "limits", "host", "lcm")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["failed"] == {} and found["left_out"] == []
    assert found["environment"]["versions"]["torch"] and found["matmul, float32"]["teraflops"] > 0
    trained = found["train, latent_consistency, 8 pairs, eager"]
    assert trained["skipped_updates"] == 0 and len(trained["losses"]) == 2
    rate = found["flops, latent_consistency, one pair"]["teraflops"] * trained["pairs_per_second"]
    assert abs(trained["teraflops_per_second"] / rate - 1) < 0.01
    assert found["host, png"]["64 px"]["ms_1_threads"] > 0

"""`cluster/slurm.sh` on one machine, with stand-ins for Slurm's commands and a real Ray."""

import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
from ray_nodes import environment, forgotten, free_port

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm.sh"
STAND_INS = {
    "scontrol": "echo 127.0.0.1",
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',  # on this machine, whatever its options
    "cdpo": """
        [[ $1 == run ]] || exit 64
        python -c 'import os, ray; ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR"); print(
            "nodes", len(ray.nodes()), oct(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o777), flush=True)'
        sleep "$2"; exit 7""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Environment of a job of one machine."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "one", "CDPO_CPUS_PER_NODE": "1"}
    found = environment(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0", HOME=str(tmp_path), **job)
    return found | {"PATH": f"{tmp_path / 'bin'}:{found['PATH']}"}


def test_the_script_is_valid_for_bash_and_can_be_executed() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, SCRIPT], check=True)


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.parametrize("stopped", [False, True])
def test_a_job_runs_on_its_own_ray_and_ends_what_it_started(
    slurm: dict[str, str], tmp_path: Path, stopped: bool
) -> None:
    port = 20000 + int(slurm["SLURM_JOB_ID"]) % 10000
    with forgotten(port):
        command = ["bash", str(SCRIPT), "600" if stopped else "0"]
        job = subprocess.Popen(command, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: list[str] = []
        assert job.stdout
        for line in job.stdout:
            lines.append(line)
            if stopped and line.startswith("nodes"):
                os.kill(job.pid, signal.SIGTERM)
        code = job.wait(timeout=120)
    assert "nodes 1 0o600\n" in lines, lines
    assert code == (143 if stopped else 7)
    assert not [*tmp_path.glob(".cdpo-token-*")], "the token is deleted"
    for _ in range(50):
        if not (left := [each for each in commands() if f":{port}" in each or f"={port} " in each]):
            break
        time.sleep(0.2)
    assert not left


def commands() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
        except OSError:  # it has ended
            continue
    return found

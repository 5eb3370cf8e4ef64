"""A reward that ends its process is reported by the next process; other processes and calls are not blamed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdpo_ray.rewards import crashes
from cdpo_ray.rewards.crashes import report_crashes

JOB = "01000000"
PROGRAM = """
import os, sys
from cdpo_ray.rewards.crashes import report_crashes
with report_crashes(sys.argv[1], [sys.argv[2]]):
    {action}
"""
EXITS = "print('no licence found \\x1b[1m', file=sys.stderr, flush=True); os._exit(7)"
CRASHES = "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"


def call(action: str, log: Path, *, reward: str = "mine:f", prompt: str = "a cat", job: str = JOB) -> int:
    """Call a reward in a process whose standard error is ``log``; returns the exit code."""
    with log.open("wb") as stderr:
        command = [sys.executable, "-c", PROGRAM.format(action=action), reward, prompt]
        environment = os.environ | {"RAY_JOB_ID": job}
        return subprocess.run(command, stderr=stderr, env=environment, check=False).returncode


@pytest.mark.parametrize(
    ("action", "output"),
    [
        (EXITS, r"last output: no licence found \x1b[1m"),
        (CRASHES, "last output: Fatal Python error: Segmentation fault | File "),
        ("os.kill(os.getpid(), 9)", "last output: none"),
    ],
)
def test_fault_61_the_fourth_process_reports_the_reward_with_its_last_output(
    tmp_path: Path, action: str, output: str
) -> None:
    for number in range(3):
        assert call(action, tmp_path / f"{number}.err") in (7, -11, -9)
    assert call("pass", tmp_path / "other.err", prompt="a dog") == 0, "another call is not blamed"
    assert call("pass", tmp_path / "job.err", job="02000000") == 0, "another run is not blamed"
    assert call(action, tmp_path / "3.err") == 1
    message = (tmp_path / "3.err").read_text().splitlines()[-1]
    assert message.startswith(
        "cdpo_ray.errors.RewardError: reward `mine:f`: ended its process 3 times (it called os._exit, crashed in native"
        " code, or was killed, perhaps out of memory); last output: "
    )
    assert output in message
    assert call("pass", tmp_path / "4.err") == 0, "reported once: the same command may try again"
    assert not list(tmp_path.glob("reward-*"))


def test_a_successful_call_clears_earlier_crashes(tmp_path: Path) -> None:
    for number in range(2):
        call(EXITS, tmp_path / f"{number}.err")
    assert len(list(tmp_path.glob("reward-*"))) == 2
    assert call("pass", tmp_path / "2.err") == 0
    assert not list(tmp_path.glob("reward-*"))


def test_running_processes_do_not_count_as_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "worker.err"
    log.touch()
    monkeypatch.setenv("RAY_JOB_ID", JOB)
    monkeypatch.setattr(crashes, "_log_of_this_process", lambda: log)
    with report_crashes("mine:f", ["a cat"]):
        (running,) = tmp_path.glob("reward-*")
        for alive in (os.getppid(), 1):
            (tmp_path / f"{running.name.rpartition('-')[0]}-{alive}").touch()
        with report_crashes("mine:f", ["a cat"]):
            pass
    assert len(list(tmp_path.glob("reward-*"))) == 2, "files of running processes stay"


def test_nothing_is_written_outside_a_ray_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    assert crashes._log_of_this_process() is None
    environment = {name: value for name, value in os.environ.items() if name != "RAY_JOB_ID"}
    with (tmp_path / "log").open("wb") as stderr:
        command = [sys.executable, "-c", PROGRAM.format(action="os._exit(7)"), "mine:f", "a cat"]
        assert subprocess.run(command, stderr=stderr, env=environment, check=False).returncode == 7
    assert [path.name for path in tmp_path.iterdir()] == ["log"]

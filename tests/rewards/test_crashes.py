"""A reward that ends its process is named by the process after it; other processes, and other calls, are not blamed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdpo_ray.rewards import crashes
from cdpo_ray.rewards.crashes import crashes_named

JOB = "01000000"
PROGRAM = """
import os, sys
from cdpo_ray.rewards.crashes import crashes_named
with crashes_named(sys.argv[1], [sys.argv[2]]):
    {does}
"""
EXITS = "print('no licence found \\x1b[1m', file=sys.stderr, flush=True); os._exit(7)"
CRASHES = "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"


def call(does: str, log: Path, *, reward: str = "mine:f", prompt: str = "a cat", job: str = JOB) -> int:
    """One call of a reward in a process whose standard error is ``log``; returns its exit code."""
    with log.open("wb") as stderr:
        command = [sys.executable, "-c", PROGRAM.format(does=does), reward, prompt]
        environment = os.environ | {"RAY_JOB_ID": job}
        return subprocess.run(command, stderr=stderr, env=environment, check=False).returncode


@pytest.mark.parametrize(
    ("does", "words"),
    [
        (EXITS, r"its last words: no licence found \x1b[1m"),
        (CRASHES, "its last words: Fatal Python error: Segmentation fault | File "),
        ("os.kill(os.getpid(), 9)", "its last words: none"),
    ],
)
def test_fault_61_the_fourth_process_names_the_reward_with_its_last_words(
    tmp_path: Path, does: str, words: str
) -> None:
    for number in range(3):
        assert call(does, tmp_path / f"{number}.err") in (7, -11, -9)
    assert call("pass", tmp_path / "other.err", prompt="a dog") == 0, "another call is not blamed"
    assert call("pass", tmp_path / "job.err", job="02000000") == 0, "nor is another run"
    assert call(does, tmp_path / "3.err") == 1
    told = (tmp_path / "3.err").read_text().splitlines()[-1]
    assert told.startswith(
        "cdpo_ray.errors.RewardError: reward `mine:f`: ended its process 3 times (it called os._exit, crashed in native"
        " code, or was killed, perhaps because memory was full); its last words: "
    )
    assert words in told
    assert call("pass", tmp_path / "4.err") == 0, "told once: the same command may try again"
    assert not list(tmp_path.glob("reward-*"))


def test_a_call_that_ends_well_clears_the_crashes_before_it(tmp_path: Path) -> None:
    for number in range(2):
        call(EXITS, tmp_path / f"{number}.err")
    assert len(list(tmp_path.glob("reward-*"))) == 2
    assert call("pass", tmp_path / "2.err") == 0
    assert not list(tmp_path.glob("reward-*"))


def test_processes_that_run_the_same_call_now_are_no_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "worker.err"
    log.touch()
    monkeypatch.setenv("RAY_JOB_ID", JOB)
    monkeypatch.setattr(crashes, "_log_of_this_process", lambda: log)
    with crashes_named("mine:f", ["a cat"]):
        (running,) = tmp_path.glob("reward-*")
        for alive in (os.getppid(), 1):
            (tmp_path / f"{running.name.rpartition('-')[0]}-{alive}").touch()
        with crashes_named("mine:f", ["a cat"]):
            pass
    assert len(list(tmp_path.glob("reward-*"))) == 2, "theirs stay"


def test_nothing_is_written_outside_a_process_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_ID", raising=False)
    assert crashes._log_of_this_process() is None
    environment = {name: value for name, value in os.environ.items() if name != "RAY_JOB_ID"}
    with (tmp_path / "log").open("wb") as stderr:
        command = [sys.executable, "-c", PROGRAM.format(does="os._exit(7)"), "mine:f", "a cat"]
        assert subprocess.run(command, stderr=stderr, env=environment, check=False).returncode == 7
    assert [path.name for path in tmp_path.iterdir()] == ["log"]

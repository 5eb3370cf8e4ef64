"""`cdpo tune`: killed in its own process and resumed, and its output."""

import contextlib
import io
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from cdpo_ray.cli import main
from cdpo_ray.config import load_config
from cdpo_ray.search.trials import DONE, RUNNING, STOPPED, Trial, Trials

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]
CDPO = Path(sys.executable).with_name("cdpo")
LORA = "4-training/lora/pytorch_lora_weights.safetensors"
SETTINGS: dict[str, Any] = {
    "prompts": {
        "train": {"source": "scenes", "count": 8},
        "validation": {"source": "scenes", "count": 6},
        "heldout": {"source": "scenes", "count": 4},
    },
    "model": {"path": "embedded"},
    "generation": {"images_per_prompt": 4, "num_denoising_steps": 3, "guidance_scale": 1.0},
    "rewards": {"names": ["clip"]},
    "curriculum": {"num_stages": 3, "updates_per_stage": 2},
    "training": {"beta": 200, "learning_rate": 5e-3, "global_batch_size": 4, "updates_per_commit": 1},
    "evaluation": {"images_per_prompt": 2, "judges": ["clip", "oracle"], "num_margin_draws": 1},
    "search": {
        "algorithm": "random",
        "num_trials": 2,
        "max_concurrent_trials": 2,
        "images_per_prompt": 2,
        "early_prompts": 3,
        "confirm_seeds": 0,
        "stop_early": None,
        "space": {
            "training.beta": {"low": 50, "high": 1000, "log": True},
            "training.learning_rate": [5e-3, 5e-4],  # the first is the paper's here, and too high to be the best
        },
    },
}


class Search:
    """A folder in which `cdpo tune` is called."""

    def __init__(self, folder: Path) -> None:
        self.run, self.config_path = folder / "runs" / "tune", folder / "tune.json"
        self.config_path.write_text(json.dumps(SETTINGS | {"run": {"name": "tune", "dir": str(folder / "runs")}}))

    def start(self, *overrides: str) -> "subprocess.Popen[str]":
        """In a process of its own, with its own Ray."""
        return subprocess.Popen([CDPO, "tune", self.config_path, *overrides], stderr=subprocess.PIPE, text=True)

    def call(self, *overrides: str) -> tuple[int, str, str]:
        """In this process, on the local Ray of all tests; returns the exit code, the output and the log."""
        output, log = io.StringIO(), io.StringIO()
        handler, logger = logging.StreamHandler(log), logging.getLogger("cdpo_ray")
        logger.addHandler(handler)
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(log):
                code = main(["tune", str(self.config_path), *overrides])
        finally:
            logger.removeHandler(handler)
        return code, output.getvalue(), log.getvalue()

    def finish(self, *overrides: str) -> tuple[str, str]:
        code, output, log = self.call(*overrides)
        assert code == 0, log
        return output, log

    def trials(self, folder: str = "trials") -> list[Trial]:
        return [*Trials(self.run / folder).values()]


@pytest.fixture(scope="module")
def killed(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, list[Trial], str, str]:
    """A search whose driver was killed after a trial's first stage, and that was resumed and finished."""
    search = Search(tmp_path_factory.mktemp("search"))
    process = search.start("search.max_concurrent_trials=1")
    while not any(trial.reports for trial in search.trials()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if (name := "".join(child.cmdline())).startswith("ray::") and "Agent" not in name
    ]
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "a worker of a killed driver ends by itself"
    found = search.trials()
    return search, found, *search.finish()


def test_fault_28_a_killed_search_resumes_and_no_trial_is_lost_or_trained_twice(
    killed: tuple[Search, list[Trial], str, str],
) -> None:
    search, before, _, log = killed
    trials = search.trials()
    assert before and any(trial.state == RUNNING and trial.reports for trial in before), "it was killed within a trial"
    assert [trial.number for trial in trials] == [1, 2] and trials[0].state == DONE
    for trial in trials:
        assert trial.state in (DONE, STOPPED)
        assert [report["stage"] for report in trial.reports] == list(range(1, trial.last_stage + 1))
    for was, now in zip(before, trials, strict=False):
        assert now.point == was.point and now.reports[: len(was.reports)] == was.reports
    orders = [report["order"] for trial in trials for report in trial.reports]
    assert sorted(orders) == list(range(1, len(orders) + 1))
    assert log.count("done already") == 4, "images and scores must not be regenerated"


def test_a_finished_search_trains_nothing_and_has_the_same_output(
    killed: tuple[Search, list[Trial], str, str],
) -> None:
    search, _, output, _ = killed
    written = {path: path.stat().st_mtime for path in search.run.glob("*/*/trial.json")}
    again, log = search.finish()
    assert again == output and "explore" not in log
    assert written == {path: path.stat().st_mtime for path in search.run.glob("*/*/trial.json")}


def test_a_search_is_not_resumed_with_other_settings(killed: tuple[Search, list[Trial], str, str]) -> None:
    code, _, log = killed[0].call("search.early_prompts=2")
    assert code == 2
    assert "its search was started with `search.early_prompts` = 3, config says 2; delete the folder" in log


def test_a_run_of_the_best_config_trains_the_same_adapter_as_its_trial(
    killed: tuple[Search, list[Trial], str, str],
) -> None:
    search, _, _, _ = killed
    found = json.loads((search.run / "tune.json").read_text())
    config = load_config(search.run / "best.yaml")
    assert config.search is None and config.run.name == "tune-best"
    assert main(["run", str(search.run / "best.yaml")]) == 0
    best = search.run.with_name("tune-best")
    trained, alone = (load_file(folder / LORA) for folder in (search.run / "trials" / f"{found['kept']:03d}", best))
    assert trained and all(torch.equal(value, alone[name]) for name, value in trained.items())
    assert (best / "report.html").exists()


def test_the_best_and_the_papers_schedule_are_retrained_and_judged_on_held_out_prompts(
    killed: tuple[Search, list[Trial], str, str],
) -> None:
    search = killed[0]
    output, _ = search.finish("search.confirm_seeds=1")
    found = json.loads((search.run / "tune.json").read_text())
    confirmed = search.trials("confirmation")
    assert found["best"] == 2
    assert {(trial.number, trial.seed, trial.state) for trial in confirmed} == {(1, 1, DONE), (found["best"], 1, DONE)}
    for trial in confirmed:
        assert [report["is_last"] for report in trial.reports] == [True]
        assert trial.reports[0]["num_prompts"] == SETTINGS["prompts"]["heldout"]["count"]
    assert found["sentence"] in output


def test_a_finished_search_can_be_extended_by_trials(killed: tuple[Search, list[Trial], str, str]) -> None:
    search = killed[0]
    before = search.trials()
    search.finish("search.num_trials=3")
    after = search.trials()
    assert after[:2] == before and len(after) == 3 and after[2].state in (DONE, STOPPED)

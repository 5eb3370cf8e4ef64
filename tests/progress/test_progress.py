"""Progress that a step reports reaches the status, the log and the trackers; a restart duplicates nothing."""

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.errors import TrainingError
from cdpo_ray.progress import Progress
from cdpo_ray.progress import progress as progress_module
from cdpo_ray.progress.trackers import TrackedRun
from cdpo_ray.store import write_json


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    return TrackedRun("demo", tmp_path, {"training": {"beta": 200}})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0.1)


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "waited for 20 s"
        time.sleep(0.02)


def status(run: TrackedRun) -> dict[str, Any]:
    return json.loads((run.dir / "status.json").read_text())


def scalars(run: TrackedRun, step: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.dir / "tensorboard" / step)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def train(run: TrackedRun, updates: range, *, done: int, dies: bool = False) -> None:
    with Progress(run, command="cdpo run c.yaml") as progress, progress.step("train", "4-training"):
        progress.begin("train", total=8, unit="update", done=done, makes=(16, "pairs"))
        for update in updates:
            progress.record({"loss": float(update), "stage": 1.0 + update // 5}, update=update)
        progress.advance(updates[-1] - done)
        progress.end()
        if dies:
            raise TrainingError("a worker is gone")


def test_every_update_is_recorded_once_with_the_rate_and_the_time_of_the_step(run: TrackedRun) -> None:
    train(run, range(1, 9), done=0)
    found = scalars(run, "train")
    assert found["loss"] == [(update, float(update)) for update in range(1, 9)]
    assert found["stage"] == [(update, 1.0 + update // 5) for update in range(1, 9)]
    (at, rate), *_ = found["pairs_per_second"]
    assert at == 8 and rate > 0
    assert [at for at, _ in found["seconds"]] == [8]


def test_a_restart_doubles_nothing_and_loses_nothing(run: TrackedRun) -> None:
    with pytest.raises(TrainingError, match="gone"):
        train(run, range(1, 7), done=0, dies=True)
    write_json(run.dir / "status.json", status(run) | {"recorded": {"train": 5}})  # as if killed before 6 was recorded
    train(run, range(1, 9), done=4)  # records all of its updates again
    assert scalars(run, "train")["loss"] == [(update, float(update)) for update in range(1, 9)]
    assert status(run)["recorded"] == {"train": 8}


def test_a_restarted_step_replaces_its_metrics(run: TrackedRun) -> None:
    train(run, range(1, 9), done=0)
    train(run, range(1, 4), done=0)
    assert [at for at, _ in scalars(run, "train")["loss"]] == [1, 2, 3]


def test_a_restarted_worker_may_record_an_update_again(run: TrackedRun) -> None:
    with Progress(run) as progress, progress.step("train", "4-training"):
        progress.begin("train", total=8, unit="update")
        for update in (1, 2, 3, 2, 3, 4):
            progress.record({"loss": float(update)}, update=update)
    assert [at for at, _ in scalars(run, "train")["loss"]] == [1, 2, 3, 4]


def test_status_is_updated_while_a_step_reports_nothing(run: TrackedRun) -> None:
    with Progress(run, command="cdpo run c.yaml") as progress:
        assert status(run)["state"] == "running" and "folder" not in status(run)
        with progress.step("generate", "1-samples"):
            progress.begin("generate", total=10, unit="prompt", done=2, makes=(8, "images"))
            progress.advance(3)
            progress.log_line("half of it")
            wait_until(lambda: "line" in status(run))
            found = status(run)
            assert (found["folder"], found["done"], found["total"], found["unit"]) == ("1-samples", 5, 10, "prompt")
            assert found["rate"] > 0 and found["seconds_left"] > 0 and found["line"] == "half of it"
        wait_until(lambda: "folder" not in status(run))
    assert (status(run)["state"], status(run)["command"]) == ("ended", "cdpo run c.yaml")


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (TrainingError("a worker is gone"), "failed", "TrainingError: a worker is gone"),
        (KeyboardInterrupt(), "stopped", None),
    ],
)
def test_the_status_names_what_ended_a_run_and_at_which_unit(
    run: TrackedRun, error: BaseException, state: str, why: str | None
) -> None:
    with pytest.raises(type(error)), Progress(run) as progress, progress.step("train", "4-training"):  # noqa: PT012
        progress.begin("train", total=8, unit="update")
        progress.advance(3)
        raise error
    found = status(run)
    assert (found["state"], found.get("error"), found["folder"], found["done"]) == (state, why, "4-training", 3)


def test_rounds_are_recorded_separately(run: TrackedRun) -> None:
    for number in (1, 2):
        with Progress(run, num_rounds=2) as progress, progress.step("train", "4-training", round=number):
            progress.begin("train", total=8, unit="update")
            progress.record({"loss": float(number)}, update=1)
    assert scalars(run, "round-1/train")["loss"] == [(1, 1.0)]
    assert scalars(run, "round-2/train")["loss"] == [(1, 2.0)]


def test_the_log_shows_progress_and_the_time_left(run: TrackedRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="cdpo_ray")
    with Progress(run) as progress, progress.step("train", "4-training"):
        progress.begin("train", total=8, unit="update")
        progress.advance(2)
        wait_until(
            lambda: any(re.fullmatch(r"train: 2/8 updates, .* updates/\w+, .* left", line) for line in caplog.messages)
        )


def test_fault_56_a_step_without_progress_logs_what_it_is_waiting_for(
    run: TrackedRun, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "IDLE_SECONDS", 0.2)
    caplog.set_level(logging.INFO, logger="cdpo_ray")

    def lines() -> list[str]:
        return [line for line in caplog.messages if "no progress" in line]

    with Progress(run) as progress, progress.step("score", "2-scores", waiting_for="reward `own:slow`"):
        wait_until(lines)
        assert lines()[0] == "score: no progress for 0 s; waiting for reward `own:slow`"
        progress.begin("score", total=8, unit="prompt")
        progress.advance(2)
        caplog.clear()
        wait_until(lines)
        assert lines() == ["score: no progress for 0 s at 2/8 prompts; waiting for reward `own:slow`"]
        wait_until(lambda: status(run).get("line") == lines()[0])
    caplog.clear()
    time.sleep(0.3)
    assert lines() == []


def test_a_status_that_cannot_be_written_does_not_stop_the_run(
    run: TrackedRun, caplog: pytest.LogCaptureFixture
) -> None:
    (run.dir / "status.json.tmp").mkdir()
    train(run, range(1, 9), done=0)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "status.json: cannot be written, the run continues" in warnings[0]


def test_without_a_run_progress_only_counts() -> None:
    progress = Progress()
    progress.begin("generate", total=2, unit="prompt")
    progress.advance()
    progress.record({"loss": 1.0}, update=1)
    progress.log_line("a line")
    progress.end()


def test_the_estimate_of_a_step_is_in_its_own_status_only(run: TrackedRun) -> None:
    predicted = {"gpu": "h100", "seconds": 60}
    with Progress(run, command="cdpo run c.yaml") as progress:
        with progress.step("generate", "1-samples", predicted=predicted):
            assert status(run)["predicted"] == predicted
        with progress.step("score", "2-scores"):
            assert "predicted" not in status(run)

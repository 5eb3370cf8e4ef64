"""`cdpo status` shows the status of a run from its folder."""

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from finished_runs import judged

from cdpo_ray.cli import main
from cdpo_ray.cli.status import view
from cdpo_ray.errors import StoreError
from cdpo_ray.progress.status import STATUS, run_status
from cdpo_ray.records import STEP_FOLDERS
from cdpo_ray.store import RunFolder, write_json

NOW = datetime(2026, 3, 4, 12, 0, 0, tzinfo=UTC)


def finish(path: Path, *folders: str, warnings: tuple[str, ...] = ()) -> None:
    path.mkdir(exist_ok=True)
    for folder in folders:
        with RunFolder(path).writing(folder, {}, {}, seed=0, resumable=False) as (_, output):
            output.counts |= {"prompts": 8, "prompts_cut": 0}
            output.warnings += warnings


def write_status(path: Path, *, seconds_ago: float = 2, **values: Any) -> None:
    status = {"command": "cdpo run c.yaml", "num_rounds": 1, "pid": os.getpid(), "host": platform.node()}
    status |= {"state": "running", "time": (NOW - timedelta(seconds=seconds_ago)).isoformat()}
    write_json(path / STATUS, status | values)


TRAINING = {"folder": "4-training", "round": 1, "done": 50, "total": 400, "unit": "update"}


def test_the_estimate_is_shown_next_to_the_measured_time(tmp_path: Path) -> None:
    run, predicted = tmp_path / "run", {"gpu": "h100", "seconds": 4320}
    run.mkdir()
    with RunFolder(run).writing("1-samples", {}, {}, seed=0, resumable=False) as (_, output):
        output.counts["prompts"] = 8
        output.details["predicted"] = predicted
    write_status(run, **TRAINING, rate=0.08, seconds_left=4375.0, predicted=predicted)
    lines = run_status(run, now=NOW).text.splitlines()
    assert "8 prompts, 0 s (estimated 1 h 12 min on h100), until 20" in lines[1]
    assert lines[4].endswith("1 h 12 min left, estimated 1 h 12 min on h100, on course for 1 h 23 min")  # 400 / 0.08 s


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_running_step_shows_its_progress_and_remaining_time(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(run, *STEP_FOLDERS[:3], warnings=("3 prompts form no pair",))
    write_status(run, **TRAINING, rate=2.0, seconds_left=175.0, line="stage 1/4: 50 updates")
    found = run_status(run, now=NOW)
    assert not found.is_interrupted
    lines = found.text.splitlines()
    assert lines[1].startswith("  1-samples     done     8 prompts, 0 s, until 20")
    assert lines[2] == "                warning: 3 prompts form no pair"
    assert lines[7] == "  4-training    running  50/400 updates, 2 updates/s, 2 min 55 s left"
    assert lines[8] == "  5-evaluation  pending"
    assert lines[10:] == [
        f"running: pid {os.getpid()} on {platform.node()}; last heartbeat 2026-03-04 11:59:58 UTC, 2 s ago",
        "last log line: stage 1/4: 50 updates",
    ]


@pytest.mark.parametrize(
    "how", ["its process has ended", "no heartbeat for minutes", "no heartbeat for minutes on another machine"]
)
def test_a_killed_run_is_distinguished_from_a_running_one(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    finish(run, *STEP_FOLDERS[:3])
    pid = dead_pid() if "ended" in how else os.getpid()
    host = "elsewhere" if "machine" in how else platform.node()
    write_status(run, **TRAINING, seconds_ago=200 if "heartbeat" in how else 2, pid=pid, host=host)
    found = run_status(run, now=NOW)
    assert found.is_interrupted
    assert "  4-training    stopped  50/400 updates\n" in found.text
    assert f"\nno heartbeat from pid {pid} on {host} since 2026-03-04 11:5" in found.text
    assert found.text.endswith("\nnext: cdpo run c.yaml")


def test_a_process_of_another_machine_is_alive_while_it_sends_heartbeats(tmp_path: Path) -> None:
    finish(tmp_path / "run", "1-samples")
    write_status(tmp_path / "run", pid=dead_pid(), host="elsewhere")
    assert not run_status(tmp_path / "run", now=NOW).is_interrupted


def test_a_failed_run_shows_its_error_and_its_newest_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(run, *STEP_FOLDERS[:3])
    for update, whole in ((25, True), (50, True), (75, False)):
        commit = run / "4-training.partial" / "commits" / f"update-{update:06d}"
        commit.mkdir(parents=True)
        if whole:
            write_json(commit / "manifest.json", {})
    write_status(run, **TRAINING, state="failed", error="TrainingError: loss is not finite;\nlower it")
    found = run_status(run, now=NOW)
    assert found.is_interrupted
    assert found.text.splitlines()[4:] == [
        "  4-training    failed   50/400 updates",
        "                a restart resumes after update-000050",
        "  5-evaluation  pending",
        "",
        "failed: 2026-03-04 11:59:58 UTC, 2 s ago",
        "  TrainingError: loss is not finite;",
        "  lower it",
        "correct the error first: the same command may fail again",
        "next: cdpo run c.yaml",
    ]


def test_on_a_terminal_the_status_is_a_table_with_a_bar_and_no_markup_of_the_run_is_interpreted(tmp_path: Path) -> None:
    run = tmp_path / "[red]run"
    finish(run, *STEP_FOLDERS[:3], warnings=("[bold]3 prompts[/bold] form no pair",))
    write_status(run, **TRAINING, rate=2.0, seconds_left=175.0, line="stage 1/4: 50 updates")
    shown = view(run_status(run, now=NOW), [], width=100)
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines()
    assert lines[1].split() == ["step", "state", "progress"]
    bar = (
        next(number for number, line in enumerate(lines) if "50/400 updates, 2 updates/s, 2 min 55 s left" in line) + 1
    )
    assert (
        lines[bar].strip()[:3] == "━" * 3
        and lines[bar].count("━") + lines[bar].count("╸") + lines[bar].count("╺") == 30
    )
    assert any("warning: [bold]3 prompts[/bold] form no pair" in line for line in lines)
    assert "[red]run" in lines[0] and "\x1b[" in shown
    assert max(map(len, lines)) <= 100


def test_a_finished_run_shows_its_report_and_each_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    finish(run, *STEP_FOLDERS)
    (run / "report.html").touch()
    (run / "config.yaml").write_text("rewards: {names: [clip], rank_by: null}\n")
    metrics = {"judges": {"clip": judged(0.5, 0.6)}, "num_prompts": 20, "images_per_prompt": 2}
    write_json(run / "5-evaluation" / "metrics.json", metrics)
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.endswith(
        f"\n\ndone\nreport: {run}/report.html\n"
        "  clip 0.50 → 0.60, +0.10 [+0.09, +0.10], win rate 71 %: improved (trained on)\n"
    )


def test_a_run_with_all_steps_is_done_whatever_its_status_file_says(tmp_path: Path) -> None:
    finish(tmp_path / "run", *STEP_FOLDERS)
    assert run_status(tmp_path / "run").text.endswith("\n\ndone")
    write_status(tmp_path / "run", state="failed", error="StoreError: made with another beta")
    assert not run_status(tmp_path / "run", now=NOW).is_interrupted


def test_each_round_is_shown(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    finish(run / "round-1", *STEP_FOLDERS)
    write_status(run, **TRAINING | {"folder": "1-samples", "round": 2}, num_rounds=2)
    lines = run_status(run, now=NOW).text.splitlines()
    assert (lines[1], lines[7]) == ("round 1/2", "round 2/2")
    assert lines[8] == "  1-samples     running  50/400 updates"
    assert [line.split()[1] for line in lines[2:7]] == ["done"] * 5


def test_a_run_of_some_steps_shows_how_to_resume_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(tmp_path / "run", "1-samples")
    write_status(tmp_path / "run", state="ended")
    assert main(["status", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().out.endswith("\n\nnot running\nnext: cdpo run c.yaml\n")
    finish(tmp_path / "run", *STEP_FOLDERS[1:])
    assert main(["status", str(tmp_path / "run")]) == 0


def test_a_folder_that_is_no_run_and_a_damaged_status_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"StoreError: {tmp_path}: is not a run's folder; give one, such as runs/<name>\n"
    (tmp_path / STATUS).write_text("{")
    with pytest.raises(StoreError, match=r"status\.json: is damaged"):
        run_status(tmp_path)


def test_status_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    finish(tmp_path / "run", "1-samples")
    code = (
        "import sys; from cdpo_ray.cli import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'ray', 'tensorboardX'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code, "status", tmp_path / "run"], capture_output=True, text=True)
    assert (found.stdout.splitlines()[-1], found.stderr) == ("[]", "")


def test_a_search_shows_its_trials_and_is_done_once_its_results_are_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(run, "1-samples", "2-scores", "validation", "heldout")
    for number, state in enumerate(["done", "stopped", "done", "running"], start=1):
        (run / "trials" / f"{number:03d}").mkdir(parents=True)
        write_json(run / "trials" / f"{number:03d}" / "trial.json", {"state": state})
    write_status(run, command="cdpo tune c.yaml", folder="trials", round=1, pid=dead_pid())
    found = run_status(run, now=NOW)
    assert found.is_interrupted
    assert "  trials        2 done, 1 running, 1 stopped\n  confirmation  pending" in found.text
    assert "3-stages" not in found.text and found.text.endswith("next: cdpo tune c.yaml")
    write_status(run, state="ended")
    assert run_status(run, now=NOW).is_interrupted, "its results are not written yet"
    write_json(run / "tune.json", {})
    assert not run_status(run, now=NOW).is_interrupted


@pytest.mark.parametrize(
    "value",
    [[], 3, None, "text", {}, {"state": []}, {"num_rounds": 1e7}, {"num_rounds": 10**7}, {"num_rounds": 0}, {"pid": 0},
     {"pid": -1}, {"pid": 2**70}, {"pid": "1"}, {"time": "yesterday"}, {"time": "2026-03-04T12:00:00"}, {"time": 3},
     {"host": {}}, {"done": -1}, {"rate": "fast"}, {"rate": 1e300}, {"predicted": {"gpu": 3}}, {"error": ["a"]},
     {"run_ids": {"wandb": "../../x"}}, {"command": ["rm"]}],
)  # fmt: skip
def test_fault_52_an_invalid_status_is_named(value: Any, tmp_path: Path) -> None:
    finish(tmp_path / "run", "1-samples")
    if isinstance(value, dict) and value:
        write_status(tmp_path / "run", **{"state": "running"} | value)
    else:
        write_json(tmp_path / "run" / STATUS, value)
    with pytest.raises(StoreError, match=r"status\.json: is damaged .*; delete it: it holds none of the run's results"):
        run_status(tmp_path / "run", now=NOW)


def test_fault_52_a_status_that_is_not_json_or_not_a_regular_file_is_named_without_waiting(tmp_path: Path) -> None:
    finish(tmp_path / "run", "1-samples")
    path = tmp_path / "run" / STATUS
    for text in (b"[" * 100_000, b"\xff\xfe", b"", b"9" * 10_000):
        path.write_bytes(text)
        with pytest.raises(StoreError, match=r"status\.json: is damaged \(Invalid JSON"):
            run_status(tmp_path / "run")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match=r"status\.json: is damaged \(not a regular file\)"):
        run_status(tmp_path / "run")


def test_fault_52_control_characters_are_shown_escaped(tmp_path: Path) -> None:
    run, evil = tmp_path / "run", "\x1b]0;owned\x07\r\u202e\x9b31m"
    run.mkdir()
    with RunFolder(run).writing("1-samples", {}, {}, seed=0, resumable=False) as (_, output):
        output.counts[f"pro{evil}mpts"] = 8
        output.warnings.append(evil)
        output.details["predicted"] = {"gpu": evil, "seconds": 5}
    for state in ("failed", "running", "stopped"):
        write_status(
            run, **TRAINING | {"unit": evil}, state=state, error=evil, line=evil, host=evil, command=evil, rate=2.0
        )
        text = run_status(run, now=NOW).text
        assert r"\x1b]0;owned\x07\r\u202e\x9b31m" in text
        assert all(line.isprintable() for line in text.split("\n"))


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf ~",
        "cdpo run c.yaml; rm -rf ~",
        "cdpo run $(id).yaml; id",
        "cdpo compare a b.yaml",
        "cdpo run -v.yaml",
        "cdpo run c.yaml --address=evil:1",
        "cdpo run c.yaml rewards.names=[theirs:judge]",
        "cdpo run c.yaml rewards.vlm_alignment.endpoint.url=http://evil/v1",
        "cdpo run c.yaml model.path=evil/model",
        "cdpo run c.yaml run.samples_from=/evil",
        "cdpo run c.yaml 'training.beta=1\nrm'",
        "cdpo run 'c.yaml",
        "cdpo run {run}/config.yaml",
        "cdpo",
        "",
    ],
)
def test_fault_52_a_possibly_harmful_command_is_not_shown(command: str, tmp_path: Path) -> None:
    finish(tmp_path / "run", "1-samples")
    write_status(tmp_path / "run", state="ended", command=command.format(run=tmp_path / "run"))
    last = run_status(tmp_path / "run", now=NOW).text.splitlines()[-1]
    assert last == "next: run the original command again; it resumes the run"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("cdpo tune configs/tune.yaml", "cdpo tune configs/tune.yaml"),
        ("cdpo run 'my configs/a b.yaml' training.beta=5", "cdpo run 'my configs/a b.yaml' training.beta=5"),
        ("cdpo run '$(id).yaml' run.name=x", "cdpo run '$(id).yaml' run.name=x"),
    ],
)
def test_fault_52_a_harmless_command_is_shown(command: str, shown: str, tmp_path: Path) -> None:
    finish(tmp_path / "run", "1-samples")
    write_status(tmp_path / "run", state="ended", command=command)
    assert run_status(tmp_path / "run", now=NOW).text.endswith(f"next: {shown}")


def test_fault_59_damage_and_an_edited_config_are_named_and_the_run_is_not_done(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(run, *STEP_FOLDERS[:3], STEP_FOLDERS[4])
    with RunFolder(run).writing("4-training", {"training": {"beta": 5}}, {}, seed=0, resumable=False) as (folder, _):
        (folder / "adapter.safetensors").write_text("weights")
    config = "rewards: {{names: [clip], rank_by: null}}\ntraining: {{beta: {beta}}}\n"
    (run / "config.yaml").write_text(config.format(beta=5))
    assert not run_status(run).is_interrupted
    (run / "config.yaml").write_text(config.format(beta=6))
    found = run_status(run)
    assert found.is_interrupted
    assert "edited: " in found.text and "4-training was made with: `training.beta` was 5, the file says 6" in found.text
    (run / "config.yaml").unlink()
    (run / "4-training" / "adapter.safetensors").write_text("WEIGHTS")
    assert "adapter.safetensors: was altered" in run_status(run).text
    (run / "4-training" / "adapter.safetensors").unlink()
    assert "adapter.safetensors: is missing" in run_status(run).text

"""Run folder -> what is done, what runs, what failed and why, what is next: `cdpo status RUN`; asks nobody else."""

import contextlib
import os
import platform
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdpo_ray.errors import StoreError
from cdpo_ray.progress.pace import duration, rate_in_words
from cdpo_ray.records import (
    CONFIRMATION,
    FOUND,
    HELDOUT,
    PREDICTED,
    SAMPLES,
    SCORES,
    STEP_FOLDERS,
    TRIAL,
    TRIALS,
    VALIDATION,
)
from cdpo_ray.store import MANIFEST, RunFolder, exists, read_json

STATUS = "status.json"
SHARED_FOLDERS = (SAMPLES, SCORES, VALIDATION, HELDOUT)
"""Steps of a search's run."""
SEARCH_FOLDERS = (VALIDATION, HELDOUT, f"{VALIDATION}.partial", TRIALS)
"""By one of which a search's run is known."""
LIFE_SECONDS = 60.0  # a process that was silent for so long is taken for dead; it writes every few seconds


@dataclass(frozen=True)
class RunStatus:
    """What `cdpo status` prints, and whether the run stands still before its end."""

    text: str
    stands_still: bool


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What the latest process told of itself; none if there was none yet.

    Raises:
        StoreError: the file is damaged.
    """
    path = run_dir / STATUS
    try:
        status: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StoreError(f"{path}: is damaged ({error}); delete it, it holds none of the run's results") from None
    return status


def run_status(run_dir: Path, *, now: datetime | None = None) -> RunStatus:
    """Tell how a run stands.

    Raises:
        StoreError: this is no run's folder, or a file in it is damaged.
    """
    status = read_status(run_dir)
    rounds = _rounds(run_dir, status)
    if status is None and not any(run.has(folder) for run in rounds for folder in STEP_FOLDERS):
        raise StoreError(f"{run_dir}: no run is there; give the folder of one, as runs/<name>")
    status = status or {}
    now = now or datetime.now(UTC)
    alive = status.get("state") == "running" and _is_alive(status, now)
    lines = [str(run_dir)]
    searches = any(exists(run_dir / folder) for folder in SEARCH_FOLDERS)
    for number, run in enumerate(rounds, start=1):
        if len(rounds) > 1:
            lines.append(f"round {number}/{len(rounds)}")
        for folder in SHARED_FOLDERS if searches else STEP_FOLDERS:
            here = status if (status.get("folder"), status.get("round")) == (folder, number) else None
            lines += _step_lines(run, folder, here, alive=alive)
    if searches:
        lines += [_trials_line(run_dir / folder) for folder in (TRIALS, CONFIRMATION)]
        done = status.get("state") == "ended" and exists(run_dir / FOUND)
    else:
        done = all(run.has(folder) for run in rounds for folder in STEP_FOLDERS)
    lines += ["", *_end_lines(status, now, alive=alive, done=done)]
    return RunStatus("\n".join(lines), stands_still=not (alive or done))


def _rounds(run_dir: Path, status: dict[str, Any] | None) -> list[RunFolder]:
    count = (status or {}).get("num_rounds") or sum(1 for _ in run_dir.glob("round-*")) or 1
    if count == 1:
        return [RunFolder(run_dir)]
    return [RunFolder(run_dir / f"round-{number}") for number in range(1, count + 1)]


def _step_lines(run: RunFolder, folder: str, here: dict[str, Any] | None, *, alive: bool) -> list[str]:
    """A line a step, and one below it for each of its warnings, or for its newest commit."""

    def line(state: str, *told: str) -> str:
        return f"  {folder:<14}{state:<9}{', '.join(told)}".rstrip()

    if run.has(folder):
        manifest = run.manifest(folder)
        counts = [f"{count} {name.replace('_', ' ')}" for name, count in manifest["counts"].items() if count]
        ended = datetime.fromisoformat(manifest["created"])
        took = duration(manifest["seconds"])
        if predicted := manifest["details"].get(PREDICTED):
            took += f" ({_estimated(predicted)})"
        head = line("done", *counts, f"{took}, until {ended:%Y-%m-%d %H:%M} UTC")
        return [head, *(f"{'':16}warning: {warning}" for warning in manifest["warnings"])]
    began = (run.path / f"{folder}.partial").is_dir()
    commit = _newest_commit(run.path / f"{folder}.partial")
    below = [f"{'':16}a restart goes on after {commit}"] if commit else []
    if here is None:
        return [line("begun" if began else "to do"), *below]
    told = [f"{here['done']}/{here['total']} {here['unit']}s"] if "done" in here else []
    if alive and here.get("rate"):
        told += [rate_in_words(here["rate"], here["unit"]), f"{duration(here['seconds_left'])} left"]
        if predicted := here.get(PREDICTED):
            told.append(f"{_estimated(predicted)}, on course for {duration(here['total'] / here['rate'])}")
    return [line("running" if alive else "failed" if here["state"] == "failed" else "stopped", *told), *below]


def _estimated(predicted: dict[str, Any]) -> str:
    return f"estimated {duration(predicted['seconds'])} on {predicted['gpu']}"


def _trials_line(folder: Path) -> str:
    """How many trials of a search are in which state; a line each would be long, the table of its end has them."""
    states = Counter(read_json(path)["state"] for path in folder.glob(f"*/{TRIAL}"))
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "to do"
    return f"  {folder.name:<14}{told}"


def _newest_commit(partial: Path) -> str | None:
    """Name of training's newest commit, as ``update-000050``."""
    return max((path.parent.name for path in partial.glob(f"commits/*/{MANIFEST}")), default=None)


def _end_lines(status: dict[str, Any], now: datetime, *, alive: bool, done: bool) -> list[str]:
    process = f"pid {status.get('pid')} on {status.get('host')}"
    goes_on = f"next: {status.get('command') or 'the command that began it goes on with it'}"
    if status:
        when = datetime.fromisoformat(status["time"])
        ago = f"{when:%Y-%m-%d %H:%M:%S} UTC, {duration((now - when).total_seconds())} ago"
    if alive:
        said = [f"said last: {status['line']}"] if "line" in status else []
        return [f"running: {process}; last sign of life {ago}", *said]
    if done:
        return ["done"]
    if status.get("state") == "failed":
        return [f"failed: {ago}", *(f"  {line}" for line in status["error"].splitlines()), goes_on]
    if status.get("state") == "running":
        return [f"no sign of life of {process} since {ago}", goes_on]
    if status.get("state") == "stopped":
        return [f"stopped from outside: {ago}", goes_on]
    return ["nothing runs", goes_on]


def _is_alive(status: dict[str, Any], now: datetime) -> bool:
    if (now - datetime.fromisoformat(status["time"])).total_seconds() > LIFE_SECONDS:
        return False
    if status["host"] != platform.node():
        return True
    with contextlib.suppress(PermissionError):  # it is another user's, so it is there
        try:
            os.kill(status["pid"], 0)
        except ProcessLookupError:
            return False
    return True

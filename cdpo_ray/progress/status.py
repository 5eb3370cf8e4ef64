"""Run folder -> state of each step and the command to run next, for `cdpo status RUN`; reads only that folder."""

import platform
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.errors import ConfigError, StoreError, printable
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
from cdpo_ray.store import MANIFEST, RunFolder, exists, is_alive, is_local, path_within, read_untrusted
from cdpo_ray.store.untrusted import Count, Predicted, Timestamp, other_keys_allowed

STATUS = "status.json"
SHARED_FOLDERS = (SAMPLES, SCORES, VALIDATION, HELDOUT)
"""Steps of a search's run."""
SEARCH_FOLDERS = (VALIDATION, HELDOUT, f"{VALIDATION}.partial", TRIALS)
"""Any of these folders marks a search's run."""
HEARTBEAT_TIMEOUT_SECONDS = 60.0  # without a heartbeat, after which a process counts as dead
READ_UP_TO = 2**20  # bytes; of larger files only presence and size are compared with the manifest
MAX_ROUNDS = 1000
MAX_ERROR_LINES = 20
SHOWN_OVERRIDE = re.compile(
    r"(rounds|run\.(name|dir|seed)|(generation|curriculum|training|resources)\.[a-z_.]+)=[\w./+,:{}\[\] -]+"
)
"""Overrides that choose no address, environment variable, code or model."""


Bounded = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
"""A rate, or a value derived from it; negative while units are repeated."""


@other_keys_allowed
class Status(TypedDict):
    """Schema of `status.json`."""

    state: Literal["running", "ended", "failed", "stopped"]
    time: Timestamp
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    host: str
    num_rounds: Annotated[int, Field(ge=1, le=MAX_ROUNDS)]
    command: NotRequired[str | None]
    folder: NotRequired[str]
    round: NotRequired[Count]
    done: NotRequired[Count]
    total: NotRequired[Count]
    unit: NotRequired[str]
    rate: NotRequired[Bounded | None]
    seconds_left: NotRequired[Bounded | None]
    predicted: NotRequired[Predicted]
    line: NotRequired[str]
    error: NotRequired[str]
    recorded: NotRequired[dict[str, Count]]
    run_ids: NotRequired[dict[str, Annotated[str, Field(pattern=r"^[\w-]{1,128}$")]]]


@other_keys_allowed
class _TrialState(TypedDict):
    state: Literal["running", "stopped", "done", "failed"]


_STATUS: TypeAdapter[Status] = TypeAdapter(Status)
_TRIAL_STATE: TypeAdapter[_TrialState] = TypeAdapter(_TrialState)


@dataclass(frozen=True)
class RunStatus:
    """Status of a run.

    Attributes:
        text: what `cdpo status` prints.
        is_interrupted: whether the run is neither finished nor running.
    """

    text: str
    is_interrupted: bool


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """Content of `status.json`, written by the run's latest process; ``None``: there is no such file.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        status: dict[str, Any] = read_untrusted(
            path_within(run_dir, STATUS), _STATUS, remedy="delete it: it holds none of the run's results"
        )
    except FileNotFoundError:
        return None
    return status


def run_status(run_dir: Path, *, now: datetime | None = None) -> RunStatus:
    """Determine the status of a run.

    Args:
        now: time with a time zone; ``None``: the current time.

    Raises:
        StoreError: the folder is not a run's, or a file in it is damaged.
    """
    status = read_status(run_dir)
    rounds = _rounds(run_dir, status)
    if status is None and not any(run.has(folder) for run in rounds for folder in STEP_FOLDERS):
        raise StoreError(f"{run_dir}: is not a run's folder; give one, such as runs/<name>")
    status = status or {}
    now = now or datetime.now(UTC)
    alive = status.get("state") == "running" and _is_alive(status, now)
    lines = [printable(run_dir, 1000)]
    searches = any(exists(run_dir / folder) for folder in SEARCH_FOLDERS)
    for number, run in enumerate(rounds, start=1):
        if len(rounds) > 1:
            lines.append(f"round {number}/{len(rounds)}")
        for folder in SHARED_FOLDERS if searches else STEP_FOLDERS:
            current = status if (status.get("folder"), status.get("round")) == (folder, number) else None
            lines += _step_lines(run, folder, current, alive=alive)
    if searches:
        lines += [_trials_line(path_within(run_dir, folder)) for folder in (TRIALS, CONFIRMATION)]
        done = status.get("state") == "ended" and exists(run_dir / FOUND)
    else:
        done = all(run.has(folder) for run in rounds for folder in STEP_FOLDERS)
    damaged = [line for run in rounds for line in _damage(run)]
    done &= not damaged
    next_line = f"next: {_command(run_dir, status) or 'run the original command again; it resumes the run'}"
    lines += ["", *damaged, *_end_lines(status, now, next_line, alive=alive, done=done)]
    return RunStatus("\n".join(lines), is_interrupted=not (alive or done))


def _damage(run: RunFolder) -> list[str]:
    """Differences between finished steps and their manifests or `config.yaml`, one line each."""
    found = []
    for folder in filter(run.has, dict.fromkeys([*STEP_FOLDERS, *SHARED_FOLDERS])):
        try:
            run.refuse_damage(folder, read_up_to=READ_UP_TO)
        except StoreError as error:
            found.append(f"damaged: {printable(error, 1000)}")
    try:
        run.config()
    except FileNotFoundError:  # it is written once all steps are done
        pass
    except (StoreError, ConfigError) as error:
        found.append(f"edited: {printable(error, 1000)}")
    return found


def _command(run_dir: Path, status: dict[str, Any]) -> str | None:
    """Command that resumes the run, if its verb, config and overrides are known to be harmless, else ``None``.

    Somebody else may have written `status.json` or a config in the run's folder: neither may choose a command.
    """
    try:
        program, verb, config, *overrides = shlex.split(status.get("command") or "")
    except ValueError:  # too few words, or an unbalanced quotation mark
        return None
    is_config = config.endswith((".yaml", ".yml")) and config.isprintable() and not config.startswith("-")
    is_in_run_dir = is_local(run_dir) and Path(config).resolve().is_relative_to(run_dir.resolve())
    harmless = all(map(SHOWN_OVERRIDE.fullmatch, overrides))
    if program != "cdpo" or verb not in ("run", "tune") or not is_config or is_in_run_dir or not harmless:
        return None
    return shlex.join(["cdpo", verb, config, *overrides])


def _rounds(run_dir: Path, status: dict[str, Any] | None) -> list[RunFolder]:
    count = (status or {}).get("num_rounds") or min(sum(1 for _ in run_dir.glob("round-*")), MAX_ROUNDS) or 1
    if count == 1:
        return [RunFolder(run_dir)]
    return [RunFolder(path_within(run_dir, f"round-{number}")) for number in range(1, count + 1)]


def _step_lines(run: RunFolder, folder: str, current: dict[str, Any] | None, *, alive: bool) -> list[str]:
    """One line per step, followed by one per warning or by one about its newest checkpoint.

    Args:
        current: `status.json` if it is about this step.
    """

    def line(state: str, *words: str) -> str:
        return f"  {folder:<14}{state:<9}{', '.join(words)}".rstrip()

    if run.has(folder):
        manifest = run.manifest(folder)
        counts = [f"{count} {printable(name.replace('_', ' '))}" for name, count in manifest["counts"].items() if count]
        ended = datetime.fromisoformat(manifest["created"])
        took = duration(manifest["seconds"])
        if predicted := manifest["details"].get(PREDICTED):
            took += f" ({_estimated(predicted)})"
        head = line("done", *counts, f"{took}, until {ended:%Y-%m-%d %H:%M} UTC")
        return [head, *(f"{'':16}warning: {printable(warning, 1000)}" for warning in manifest["warnings"])]
    is_started = (run.path / f"{folder}.partial").is_dir()
    checkpoint = _newest_checkpoint(run.path / f"{folder}.partial")
    below = [f"{'':16}a restart resumes after {checkpoint}"] if checkpoint else []
    if current is None:
        return [line("started" if is_started else "pending"), *below]
    unit, total, rate = printable(current.get("unit", "")), current.get("total", 0), current.get("rate")
    words = [f"{current['done']}/{total} {unit}s"] if "done" in current else []
    if alive and rate and rate > 1e-9:
        words += [rate_in_words(rate, unit), f"{duration(current.get('seconds_left') or 0)} left"]
        if predicted := current.get(PREDICTED):
            words.append(f"{_estimated(predicted)}, on course for {duration(total / rate)}")
    return [line("running" if alive else "failed" if current["state"] == "failed" else "stopped", *words), *below]


def _estimated(predicted: dict[str, Any]) -> str:
    return f"estimated {duration(predicted['seconds'])} on {printable(predicted['gpu'])}"


def _trials_line(folder: Path) -> str:
    """Number of trials of a search by state; `cdpo tune` prints the table of all trials at its end."""
    states = Counter(
        read_untrusted(path_within(folder, f"{path.parent.name}/{TRIAL}"), _TRIAL_STATE, remedy="see the search's log")[
            "state"
        ]
        for path in folder.glob(f"*/{TRIAL}")
    )
    states_shown = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "pending"
    return f"  {folder.name:<14}{states_shown}"


def _newest_checkpoint(partial: Path) -> str | None:
    """Name of the newest training checkpoint, such as ``update-000050``, if any."""
    newest = max((path.parent.name for path in partial.glob(f"commits/*/{MANIFEST}")), default=None)
    return newest and printable(newest)


def _end_lines(status: dict[str, Any], now: datetime, next_line: str, *, alive: bool, done: bool) -> list[str]:
    process = f"pid {status.get('pid')} on {printable(status.get('host'))}"
    if status:
        when = datetime.fromisoformat(status["time"])
        ago = f"{when:%Y-%m-%d %H:%M:%S} UTC, {duration((now - when).total_seconds())} ago"
    if alive:
        log_lines = [f"last log line: {printable(status['line'], 1000)}"] if "line" in status else []
        return [f"running: {process}; last heartbeat {ago}", *log_lines]
    if done:
        return ["done"]
    if status.get("state") == "failed":
        error = status.get("error", "").splitlines()[:MAX_ERROR_LINES]
        return [f"failed: {ago}", *(f"  {printable(line, 1000)}" for line in error), next_line]
    if status.get("state") == "running":
        return [f"no heartbeat from {process} since {ago}", next_line]
    if status.get("state") == "stopped":
        return [f"stopped by a signal: {ago}", next_line]
    return ["not running", next_line]


def _is_alive(status: dict[str, Any], now: datetime) -> bool:
    if (now - datetime.fromisoformat(status["time"])).total_seconds() > HEARTBEAT_TIMEOUT_SECONDS:
        return False
    if status["host"] != platform.node():
        return True
    return is_alive(status["pid"])

"""Run folder -> what is done, what runs, what failed and why, what is next: `cdpo status RUN`; asks nobody else."""

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
"""By one of which a search's run is known."""
HEARTBEAT_TIMEOUT_SECONDS = 60.0  # a process that was silent for so long is taken for dead; it writes every few seconds
READ_UP_TO = 2**20  # bytes; of larger files only presence and size are compared with the manifest
MAX_ROUNDS = 1000
MAX_ERROR_LINES = 20
SHOWN_OVERRIDE = re.compile(
    r"(rounds|run\.(name|dir|seed)|(generation|curriculum|training|resources)\.[a-z_.]+)=[\w./+,:{}\[\] -]+"
)
"""Overrides that choose no address, environment variable, code or model."""


Bounded = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
"""Of a rate and what follows from it: below 0 while units are done again."""


@other_keys_allowed
class Status(TypedDict):
    """`status.json`."""

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
    """What `cdpo status` prints, and whether the run stands still before its end."""

    text: str
    is_interrupted: bool


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What the latest process told of itself; none if there was none yet.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        status: dict[str, Any] = read_untrusted(
            path_within(run_dir, STATUS), _STATUS, remedy="delete it, it holds none of the run's results"
        )
    except FileNotFoundError:
        return None
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
    lines = [printable(run_dir, 1000)]
    searches = any(exists(run_dir / folder) for folder in SEARCH_FOLDERS)
    for number, run in enumerate(rounds, start=1):
        if len(rounds) > 1:
            lines.append(f"round {number}/{len(rounds)}")
        for folder in SHARED_FOLDERS if searches else STEP_FOLDERS:
            here = status if (status.get("folder"), status.get("round")) == (folder, number) else None
            lines += _step_lines(run, folder, here, alive=alive)
    if searches:
        lines += [_trials_line(path_within(run_dir, folder)) for folder in (TRIALS, CONFIRMATION)]
        done = status.get("state") == "ended" and exists(run_dir / FOUND)
    else:
        done = all(run.has(folder) for run in rounds for folder in STEP_FOLDERS)
    damaged = [line for run in rounds for line in _damage(run)]
    done &= not damaged
    goes_on = f"next: {_command(run_dir, status) or 'give the original command again; it continues'}"
    lines += ["", *damaged, *_end_lines(status, now, goes_on, alive=alive, done=done)]
    return RunStatus("\n".join(lines), is_interrupted=not (alive or done))


def _damage(run: RunFolder) -> list[str]:
    """What of the finished steps is not as their manifests say, and how `config.yaml` contradicts them, a line each."""
    found = []
    for folder in filter(run.has, dict.fromkeys([*STEP_FOLDERS, *SHARED_FOLDERS])):
        try:
            run.refuse_damage(folder, read_up_to=READ_UP_TO)
        except StoreError as error:
            found.append(f"damaged: {printable(error, 1000)}")
    try:
        run.config()
    except FileNotFoundError:  # it is written when all steps are done
        pass
    except (StoreError, ConfigError) as error:
        found.append(f"edited: {printable(error, 1000)}")
    return found


def _command(run_dir: Path, status: dict[str, Any]) -> str | None:
    """How to go on: composed of a verb, a config and overrides that are known to be harmless, else ``None``.

    `status.json` may be somebody else's, and so may a config in the run's folder: neither may choose what is run next.
    """
    try:
        program, verb, config, *overrides = shlex.split(status.get("command") or "")
    except ValueError:  # too few words, or a quotation mark too many
        return None
    is_config = config.endswith((".yaml", ".yml")) and config.isprintable() and not config.startswith("-")
    came_with_the_run = is_local(run_dir) and Path(config).resolve().is_relative_to(run_dir.resolve())
    harmless = all(map(SHOWN_OVERRIDE.fullmatch, overrides))
    if program != "cdpo" or verb not in ("run", "tune") or not is_config or came_with_the_run or not harmless:
        return None
    return shlex.join(["cdpo", verb, config, *overrides])


def _rounds(run_dir: Path, status: dict[str, Any] | None) -> list[RunFolder]:
    count = (status or {}).get("num_rounds") or min(sum(1 for _ in run_dir.glob("round-*")), MAX_ROUNDS) or 1
    if count == 1:
        return [RunFolder(run_dir)]
    return [RunFolder(path_within(run_dir, f"round-{number}")) for number in range(1, count + 1)]


def _step_lines(run: RunFolder, folder: str, here: dict[str, Any] | None, *, alive: bool) -> list[str]:
    """A line a step, and one below it for each of its warnings, or for its newest commit."""

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
    began = (run.path / f"{folder}.partial").is_dir()
    commit = _newest_commit(run.path / f"{folder}.partial")
    below = [f"{'':16}a restart goes on after {commit}"] if commit else []
    if here is None:
        return [line("begun" if began else "to do"), *below]
    unit, total, rate = printable(here.get("unit", "")), here.get("total", 0), here.get("rate")
    words = [f"{here['done']}/{total} {unit}s"] if "done" in here else []
    if alive and rate and rate > 1e-9:
        words += [rate_in_words(rate, unit), f"{duration(here.get('seconds_left') or 0)} left"]
        if predicted := here.get(PREDICTED):
            words.append(f"{_estimated(predicted)}, on course for {duration(total / rate)}")
    return [line("running" if alive else "failed" if here["state"] == "failed" else "stopped", *words), *below]


def _estimated(predicted: dict[str, Any]) -> str:
    return f"estimated {duration(predicted['seconds'])} on {printable(predicted['gpu'])}"


def _trials_line(folder: Path) -> str:
    """How many trials of a search are in which state; a line each would be long, the table of its end has them."""
    states = Counter(
        read_untrusted(path_within(folder, f"{path.parent.name}/{TRIAL}"), _TRIAL_STATE, remedy="see the search's log")[
            "state"
        ]
        for path in folder.glob(f"*/{TRIAL}")
    )
    states_shown = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "to do"
    return f"  {folder.name:<14}{states_shown}"


def _newest_commit(partial: Path) -> str | None:
    """Name of training's newest commit, as ``update-000050``."""
    newest = max((path.parent.name for path in partial.glob(f"commits/*/{MANIFEST}")), default=None)
    return newest and printable(newest)


def _end_lines(status: dict[str, Any], now: datetime, goes_on: str, *, alive: bool, done: bool) -> list[str]:
    process = f"pid {status.get('pid')} on {printable(status.get('host'))}"
    if status:
        when = datetime.fromisoformat(status["time"])
        ago = f"{when:%Y-%m-%d %H:%M:%S} UTC, {duration((now - when).total_seconds())} ago"
    if alive:
        said = [f"said last: {printable(status['line'], 1000)}"] if "line" in status else []
        return [f"running: {process}; last sign of life {ago}", *said]
    if done:
        return ["done"]
    if status.get("state") == "failed":
        error = status.get("error", "").splitlines()[:MAX_ERROR_LINES]
        return [f"failed: {ago}", *(f"  {printable(line, 1000)}" for line in error), goes_on]
    if status.get("state") == "running":
        return [f"no sign of life of {process} since {ago}", goes_on]
    if status.get("state") == "stopped":
        return [f"stopped from outside: {ago}", goes_on]
    return ["nothing runs", goes_on]


def _is_alive(status: dict[str, Any], now: datetime) -> bool:
    if (now - datetime.fromisoformat(status["time"])).total_seconds() > HEARTBEAT_TIMEOUT_SECONDS:
        return False
    if status["host"] != platform.node():
        return True
    return is_alive(status["pid"])

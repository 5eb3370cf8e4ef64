"""Run folder -> state of each step and the command to run next, for `cdpo status RUN`; reads only that folder."""

import platform
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict

from cdpo_ray.errors import ConfigError, StoreError, printable
from cdpo_ray.progress.pace import duration, rate_in_words
from cdpo_ray.records import (
    CANDIDATES,
    CONFIRMATION,
    FOUND,
    HELDOUT,
    JUDGED,
    PREDICTED,
    SAMPLES,
    SCORES,
    STEP_FOLDERS,
    TRAINING,
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
ENDINGS = ("", ".partial")
"""Ends of the names of a step's folder, finished and unfinished."""
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
class StepStatus:
    """Status of a step.

    Attributes:
        state: `done`, `running`, `failed`, `stopped`, `started` (in an earlier process) or `pending`.
        words: counts, durations and rates.
        notes: warnings, and the checkpoint that a restart resumes after.
        reached: number of finished units and of all units of the step; `None`: unknown.
    """

    folder: str
    state: str
    words: Sequence[str] = ()
    notes: Sequence[str] = ()
    reached: tuple[int, int] | None = None

    @property
    def lines(self) -> list[str]:
        head = f"  {self.folder:<14}{self.state:<9}{', '.join(self.words)}".rstrip()
        return [head, *(f"{'':16}{note}" for note in self.notes)]


@dataclass(frozen=True)
class RunStatus:
    """Status of a run.

    Attributes:
        name: path of its folder, as text.
        steps: steps of each round.
        trials: one line per folder of a search's trials, and per step of a candidate of `cdpo judge`.
        damage: one line per file that differs from a manifest or from `config.yaml`.
        end: what the run's process does or how it ended, errors, and what to do next.
        is_interrupted: whether the run is neither finished nor running.
        is_done: whether all steps are finished and undamaged.
    """

    name: str
    steps: Sequence[Sequence[StepStatus]]
    trials: Sequence[str]
    damage: Sequence[str]
    end: Sequence[str]
    is_interrupted: bool
    is_done: bool

    @property
    def text(self) -> str:
        """What `cdpo status` prints into a pipe or a file."""
        lines = [self.name]
        for number, steps in enumerate(self.steps, start=1):
            lines += [f"round {number}/{len(self.steps)}"] if len(self.steps) > 1 else []
            lines += [line for step in steps for line in step.lines]
        return "\n".join([*lines, *self.trials, "", *self.damage, *self.end])


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
    rounds = run_rounds(run_dir, status)
    if status is None and not any(run.has(folder) for run in rounds for folder in STEP_FOLDERS):
        raise StoreError(f"{run_dir}: is not a run's folder; give one, such as runs/<name>")
    status = status or {}
    now = now or datetime.now(UTC)
    alive = status.get("state") == "running" and _is_alive(status, now)
    searches = any(exists(run_dir / folder) for folder in SEARCH_FOLDERS)
    judges = exists(run_dir / CANDIDATES)
    begun = (run.path / f"{folder}{end}" for run in rounds for folder in STEP_FOLDERS for end in ENDINGS)
    is_run = not judges or any(map(exists, begun))
    folders = SHARED_FOLDERS if searches else STEP_FOLDERS if is_run else ()
    steps, trials = [], []
    for number, run in enumerate(rounds, start=1):
        places = [(folder, status if (status.get("folder"), status.get("round")) == (folder, number) else None)
                  for folder in folders]  # fmt: skip
        steps.append([_step_status(run, folder, current, alive=alive) for folder, current in places])
    if searches:
        trials = [_trials_line(path_within(run_dir, folder)) for folder in (TRIALS, CONFIRMATION)]
        done = status.get("state") == "ended" and exists(run_dir / FOUND)
    else:
        done = all(run.has(folder) for run in rounds for folder in folders)
    if judges:
        trials += [line for step in _candidate_steps(run_dir, status, alive=alive) for line in step.lines]
        done &= exists(run_dir / JUDGED)
    damage = [line for run in rounds for line in _damage(run)]
    done &= not damage
    next_line = f"next: {_command(run_dir, status) or 'run the original command again; it resumes the run'}"
    end = _end_lines(status, now, next_line, alive=alive, done=done)
    is_interrupted = not (alive or done)
    return RunStatus(printable(run_dir, 1000), steps, trials, damage, end, is_interrupted, is_done=done)


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
    if program != "cdpo" or verb not in ("run", "tune", "judge") or not is_config or is_in_run_dir or not harmless:
        return None
    return shlex.join(["cdpo", verb, config, *overrides])


def run_rounds(run_dir: Path, status: dict[str, Any] | None) -> list[RunFolder]:
    """Folder of each round of a run: the run's own if there is one round.

    Args:
        status: see `read_status`.
    """
    count = (status or {}).get("num_rounds") or min(sum(1 for _ in run_dir.glob("round-*")), MAX_ROUNDS) or 1
    if count == 1:
        return [RunFolder(run_dir)]
    return [RunFolder(path_within(run_dir, f"round-{number}")) for number in range(1, count + 1)]


def _step_status(run: RunFolder, folder: str, current: dict[str, Any] | None, *, alive: bool) -> StepStatus:
    """Status of a step.

    Args:
        current: `status.json` if it is about this step.
    """
    if run.has(folder):
        manifest = run.manifest(folder)
        counts = [f"{count} {printable(name.replace('_', ' '))}" for name, count in manifest["counts"].items() if count]
        ended = datetime.fromisoformat(manifest["created"])
        took = duration(manifest["seconds"])
        if predicted := manifest["details"].get(PREDICTED):
            took += f" ({_estimated(predicted)})"
        words = [*counts, f"{took}, until {ended:%Y-%m-%d %H:%M} UTC"]
        return StepStatus(folder, "done", words, [f"warning: {printable(text, 1000)}" for text in manifest["warnings"]])
    is_started = (run.path / f"{folder}.partial").is_dir()
    checkpoint = newest_checkpoint(run.path / f"{folder}.partial")
    notes = [f"a restart resumes after {printable(checkpoint)}"] if checkpoint else []
    if current is None:
        return StepStatus(folder, "started" if is_started else "pending", notes=notes)
    unit, total, rate = printable(current.get("unit", "")), current.get("total", 0), current.get("rate")
    words = [f"{current['done']}/{total} {unit}s"] if "done" in current else []
    if alive and rate and rate > 1e-9:
        words += [rate_in_words(rate, unit), f"{duration(current.get('seconds_left') or 0)} left"]
        if predicted := current.get(PREDICTED):
            words.append(f"{_estimated(predicted)}, on course for {duration(total / rate)}")
    state = "running" if alive else "failed" if current["state"] == "failed" else "stopped"
    return StepStatus(folder, state, words, notes, (current["done"], total) if words and total else None)


def _candidate_steps(run_dir: Path, status: dict[str, Any], *, alive: bool) -> list[StepStatus]:
    """Status of the steps of each candidate of `cdpo judge`."""
    found = []
    for path in sorted((run_dir / CANDIDATES).glob("*/")):
        run = RunFolder(path)
        is_adapter = any(exists(path / f"{TRAINING}{end}") for end in ENDINGS)
        for folder in (TRAINING, SAMPLES, SCORES) if is_adapter else (SAMPLES, SCORES):
            place = f"{CANDIDATES}/{path.name}/{folder}"
            current = status if status.get("folder") == place else None
            found.append(replace(_step_status(run, folder, current, alive=alive), folder=f"{printable(place)} "))
    return found


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


def newest_checkpoint(partial: Path) -> str | None:
    """Name of the newest training checkpoint in an unfinished `4-training`, such as ``update-000050``, if any."""
    return max((path.parent.name for path in partial.glob(f"commits/*/{MANIFEST}")), default=None)


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
        lines = [f"  {printable(line, 1000)}" for line in error]
        return [f"failed: {ago}", *lines, "correct the error first: the same command may fail again", next_line]
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

"""Kill processes at named moments of every step, and compare the result with an undisturbed run, byte for byte.

A moment is an event (a line in the log, a new file), a delay determined by the seed, and a victim. A command that fails
is run again until it succeeds. Linux only.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from PIL import Image
from safetensors import safe_open

from cdpo_ray.errors import StoreError
from cdpo_ray.records import EVALUATION, SAMPLES, SCORES, STAGES, TRAINING, VALIDATION
from cdpo_ray.store import MANIFEST, RunFolder
from cdpo_ray.testbed.scenes import caption, render, sample_scene

CDPO = Path(sys.executable).with_name("cdpo")
SMOKE = Path(__file__).parents[1] / "configs" / "smoke.yaml"
SETTINGS = "settings.json"  # of an unfinished step
PR_SET_CHILD_SUBREAPER = 36
SLOW_TICK_SECONDS, FAST_TICK_SECONDS = 0.01, 0.001
SCAN_SECONDS = 0.5  # between two scans of the processes
LIMIT_SECONDS = 600.0  # of one process; a longer one hangs
END_SECONDS = 120.0  # for the last process to end: Ray's agents notice with a delay that the others are dead
MAX_FAILURES = 3  # of one command, without a kill

DRIVER, GROUP, TERMINATED = "driver", "process group", "process group, SIGTERM"
GENERATOR, PIXEL_SCORER, SAMPLE_SCORER, COMPARER, ENCODER = (
    rf"ray::MapWorker\(MapBatches\({name}\)\)"
    for name in ("Generator", "PixelScorer", "SampleScorer", "Comparer", "Encoder")
)
TRAIN_WORKER, TRIAL = "ray::RayTrainWorker", "ray::(ImplicitFunc|run_one)"

ON_DRIVER: dict[str, Callable[[int], None]] = {
    DRIVER: lambda pid: os.kill(pid, signal.SIGKILL),
    GROUP: lambda pid: os.killpg(pid, signal.SIGKILL),
    TERMINATED: lambda pid: os.killpg(pid, signal.SIGTERM),
}

Reached = Callable[[], bool]


@dataclass(frozen=True)
class Starts:
    """Event: the command has started."""

    is_fast = False

    def watch(self, run: Path, log: Path) -> Reached:
        return lambda: True


@dataclass(frozen=True)
class Logs:
    """Event: a line of the log matches."""

    pattern: str
    is_fast = False

    def watch(self, run: Path, log: Path) -> Reached:
        start = log.stat().st_size
        return lambda: re.search(self.pattern, log.read_text(errors="replace")[start:]) is not None


@dataclass(frozen=True)
class Appears:
    """Event: a file of the run was created or rewritten since the watch started."""

    pattern: str

    @property
    def is_fast(self) -> bool:
        return "*" not in self.pattern

    def watch(self, run: Path, log: Path) -> Reached:
        before = self._found(run)
        return lambda: not self._found(run) <= before

    def _found(self, run: Path) -> set[tuple[str, int]]:
        found = set()
        with contextlib.suppress(FileNotFoundError):
            for path in [run / self.pattern] if self.is_fast else run.glob(self.pattern):
                found.add((str(path), os.stat(path).st_mtime_ns))
        return found


@dataclass(frozen=True)
class Renames:
    """Event: a step has written its manifest and is about to rename its folder, or has just renamed it."""

    folder: str
    is_fast = True

    def watch(self, run: Path, log: Path) -> Reached:
        written, in_place = str(run / f"{self.folder}.partial" / MANIFEST), str(run / self.folder / MANIFEST)
        if os.path.exists(in_place):
            return lambda: False

        def reached() -> bool:
            if os.path.exists(f"{written}.tmp"):  # the rename follows within microseconds, so do not sleep
                end = time.monotonic() + 1
                while not os.path.exists(written) and not os.path.exists(in_place) and time.monotonic() < end:
                    pass
            return os.path.exists(written) or os.path.exists(in_place)

        return reached


Event = Starts | Logs | Appears | Renames


@dataclass(frozen=True)
class Moment:
    """A moment at which a process is killed.

    Attributes:
        victim: key of `ON_DRIVER`, or regular expression that matches the start of a Ray process's title.
        max_delay: maximum delay after the event, in seconds.
    """

    step: str
    when: str
    victim: str
    event: Event
    max_delay: float = 0.0


@dataclass(frozen=True)
class Command:
    """A command and the moments at which it is disturbed.

    Moments with the same event are hit in order, each at another occurrence of the event.

    Attributes:
        config: name of its configuration, see `write_configs`.
        refusal_when_done: part of the message with which it refuses to run again after it has succeeded.
    """

    verb: str
    config: str
    arguments: tuple[str, ...]
    moments: tuple[Moment, ...]
    refusal_when_done: str | None = None

    @property
    def name(self) -> str:
        return " ".join((self.verb, self.config, *self.arguments)) if self.verb != self.config else self.verb


def commit(num_updates: int, training: str = TRAINING) -> Appears:
    return Appears(f"{training}.partial/commits/update-{num_updates:06d}/{MANIFEST}")


PARTS = "parts/*.parquet"
TRAINED = f"{TRAINING}.partial/stages.json"
COMMANDS = (
    Command(
        "run", "run", (),
        (
            Moment("generate", "starting", GROUP, Logs(r"generate \.\.\."), 3),
            Moment("generate", "a part is written", GENERATOR, Appears(f"{SAMPLES}.partial/{PARTS}"), 0.5),
            Moment("generate", "a part is written", PIXEL_SCORER, Appears(f"{SAMPLES}.partial/{PARTS}"), 0.5),
            Moment("generate", "a part is written", DRIVER, Appears(f"{SAMPLES}.partial/{PARTS}"), 0.2),
            Moment("generate", "final rename", DRIVER, Renames(SAMPLES)),
            Moment("score", "starting", GROUP, Logs(r"score \.\.\."), 4),
            Moment("score", "a scorer runs", SAMPLE_SCORER, Logs(r"score \.\.\."), 2),
            Moment("score", "final rename", DRIVER, Renames(SCORES)),
            Moment("pairs", "writing", GROUP, Appears(f"{STAGES}.partial"), 0.3),
            Moment("pairs", "final rename", DRIVER, Renames(STAGES)),
            Moment("train", "in the first stage", TRAIN_WORKER, commit(2), 0.2),
            Moment("train", "in the first stage", DRIVER, commit(4), 0.1),
            Moment("train", "at a stage's end", GROUP, commit(6), 0.1),
            Moment("train", "in the last stage", TERMINATED, commit(9), 0.1),
            Moment("train", "after the last update", DRIVER, commit(12), 0.1),
            Moment("train", "before the manifest", DRIVER, Appears(TRAINED), 0.02),
            Moment("train", "final rename", DRIVER, Renames(TRAINING)),
            Moment("evaluate", "a part is written", COMPARER, Appears(f"{EVALUATION}.partial/{PARTS}"), 0.5),
            Moment("evaluate", "a part is written", TERMINATED, Appears(f"{EVALUATION}.partial/{PARTS}"), 0.2),
            Moment("evaluate", "joining", GROUP, Appears(f"{EVALUATION}.partial/comparison.parquet"), 0.05),
            Moment("evaluate", "final rename", DRIVER, Renames(EVALUATION)),
            Moment("report", "after the last step", DRIVER, Logs("evaluate: done already"), 2),
        ),
    ),
    Command("report", "run", (), (Moment("report", "again", DRIVER, Starts(), 4),)),
    Command(
        "score", "run", ("rewards.names=[clip,jpeg_size]",),
        (
            Moment("score", "another reward", GROUP, Logs(r"score \.\.\."), 4),
            Moment("score", "another reward: scores are moved", DRIVER, Appears(f"{SCORES}/jpeg_size.parquet")),
            Moment("score", "another reward: the manifest is written", DRIVER, Appears(f"{SCORES}/{MANIFEST}")),
        ),
    ),
    Command(
        "export", "run", ("--format", "merged"),
        (Moment("export", "writing", GROUP, Appears("export/*merged*"), 0.3),),
        "exists already",
    ),
    Command(
        "export", "run", ("--format", "kohya"),
        (Moment("export", "its weights are written", DRIVER, Appears("export/.kohya.partial/run.safetensors")),),
        "exists already",
    ),
    Command(
        "import", "import", (),
        (
            Moment("import", "starting", GROUP, Logs(r"import \.\.\."), 6),
            Moment("import", "an encoder runs", ENCODER, Logs(r"import \.\.\."), 2),
            Moment("import", "final rename", DRIVER, Renames(SAMPLES)),
        ),
    ),
    Command(
        "tune", "tune", (),
        (
            Moment("tune", "sampling for all trials", GROUP, Appears(f"{VALIDATION}.partial/{PARTS}"), 0.2),
            Moment("tune", "in the first trial", TRIAL, commit(2, f"trials/001/{TRAINING}"), 0.2),
            Moment("tune", "at the first trial's stage end", TRAIN_WORKER, commit(3, f"trials/001/{TRAINING}"), 0.2),
            Moment("tune", "the first trial's final rename", TRIAL, Renames(f"trials/001/{TRAINING}")),
            Moment("tune", "in the second trial", DRIVER, commit(2, f"trials/002/{TRAINING}"), 0.2),
            Moment("tune", "writing the results", DRIVER, Appears("best.yaml"), 0.05),
        ),
    ),
)  # fmt: skip


def write_configs(folder: Path) -> None:
    """Write `run.yaml`, `import.yaml` with its images, and `tune.yaml`; their paths are relative to this folder."""
    smoke = yaml.safe_load(SMOKE.read_text())
    smoke["training"]["updates_per_commit"] = 1
    run = smoke | {
        "run": {"name": "run", "dir": "runs"},
        "prompts": {"train": {"source": "scenes", "count": 12}, "heldout": {"source": "scenes", "count": 8}},
        "generation": smoke["generation"] | {"images_per_batch": 4},
        "rewards": {"names": ["clip"], "placement": "pool", "noise_prompts": 4},
        "curriculum": {"num_stages": 2, "updates_per_stage": 6},
    }
    imported = smoke | {
        "run": {"name": "import", "dir": "runs"},
        "prompts": {"heldout": {"fraction": 0.3}},
        "preferences": {"path": "preferences", "format": "ranked_folders"},
        "generation": smoke["generation"] | {"images_per_batch": 4},
        "rewards": {"names": ["preference", "clip"], "rank_by": "preference"},
        "curriculum": smoke["curriculum"] | {"measure": "score_gap_quantile"},
    }
    tune = smoke | {
        "run": {"name": "tune", "dir": "runs"},
        "prompts": smoke["prompts"] | {"validation": {"source": "scenes", "count": 4}},
        "generation": smoke["generation"] | {"images_per_batch": 4},
        "curriculum": {"num_stages": 2, "updates_per_stage": 3},
        "search": {
            "algorithm": "random",
            "num_trials": 2,
            "max_concurrent_trials": 1,  # otherwise the order of reports would depend on timing
            "images_per_prompt": 2,
            "stop_early": None,
            "confirm_seeds": 0,
            "space": {"training.beta": {"low": 50, "high": 1000, "log": True}},
        },
    }
    for values in (run, imported, tune):
        (folder / f"{values['run']['name']}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    rng = np.random.default_rng(0)
    for number in range(16):
        scene, other = sample_scene(rng), sample_scene(rng)
        ranked = folder / "preferences" / f"{number:02d}"
        ranked.mkdir(parents=True)
        (ranked / "prompt.txt").write_text(caption(scene))
        for rank, shown in enumerate((scene, other)):
            Image.fromarray(render(shown, rng).transpose(1, 2, 0)).save(ranked / f"{rank}.png")


@dataclass
class Kill:
    """A moment that was hit.

    Attributes:
        seconds: time since the first start of the command.
        found: state of the run's folder after the kill.
        exit_code: exit code of the driver; negative: the signal that ended it.
    """

    command: str
    step: str
    when: str
    victim: str
    seconds: float
    delay: float
    found: str
    exit_code: int | None = None


class Commits:
    """Checkpoints of a run, and how often each was written."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.seen: dict[str, set[int]] = {}

    def look(self) -> None:
        for pattern in (f"{TRAINING}.partial", f"trials/*/{TRAINING}.partial"):
            with contextlib.suppress(FileNotFoundError):
                for manifest in self.run.glob(f"{pattern}/commits/update-*/{MANIFEST}"):
                    if not manifest.parent.name.endswith(".tmp"):
                        self.seen.setdefault(str(manifest), set()).add(os.stat(manifest).st_mtime_ns)

    @property
    def num_repeated(self) -> int:
        """Number of updates that were repeated although a checkpoint contained them."""
        return sum(len(times) - 1 for times in self.seen.values())


class Disturbed:
    """A command that is killed at its moments, and run again until it succeeds.

    Args:
        folder: working directory of the command.
        moments: moments at which processes are killed.
        delays: delay after each moment's event, in seconds.
    """

    def __init__(self, command: Command, folder: Path, moments: list[Moment], delays: list[float]) -> None:
        self.command, self.folder, self.run = command, folder, folder / "runs" / command.config
        self.pending = list(zip(moments, delays, strict=True))
        self.commits = Commits(self.run)
        self.kills: list[Kill] = []
        self.failures: list[str] = []
        self.gave_up = False
        self.started = time.monotonic()
        self.missed: list[Moment] = []
        self.known: dict[str, tuple[psutil.Process, str]] = {}

    def survive(self) -> None:
        """Run the command until it succeeds; give up after `MAX_FAILURES` failures without a kill."""
        num_starts = 0
        while True:
            num_starts += 1
            name = re.sub(r"\W+", "-", self.command.name).strip("-")
            log = self.folder / "logs" / f"{name}-{num_starts:02d}.log"
            with start(self.command, self.folder, log) as driver:
                deadline, num_kills = time.monotonic() + LIMIT_SECONDS, len(self.kills)
                self.known.clear()
                while (reached := self._next(driver, log, deadline)) is not None:
                    self._kill(*reached, driver)
            for kill in self.kills[num_kills:]:
                kill.exit_code = driver.returncode
            refusal = self.kills and self.command.refusal_when_done
            done = driver.returncode == 0 or (refusal and refusal in last_line(log))
            if not done and len(self.kills) == num_kills:
                self.failures.append(f"{log}: exit code {driver.returncode}: {last_line(log)}")
                print(self.failures[-1], file=sys.stderr)
            self.gave_up = not done and len(self.failures) >= MAX_FAILURES
            if done or self.gave_up:
                self.missed += [moment for moment, _ in self.pending]
                return

    def _next(self, driver: "subprocess.Popen[bytes]", log: Path, deadline: float) -> tuple[Moment, float] | None:
        """Wait for the event of a pending moment; ``None``: the driver ended."""
        first = {moment.event: (moment, delay) for moment, delay in reversed(self.pending)}
        watched = [(pair, pair[0].event.watch(self.run, log)) for pair in first.values()]
        slow = [watch for watch in watched if not watch[0][0].event.is_fast]
        fast = [watch for watch in watched if watch[0][0].event.is_fast]
        by_title = {moment.victim for (moment, _), _ in fast if not moment.max_delay} - ON_DRIVER.keys()
        due = scan_due = 0.0
        while driver.poll() is None:
            now, current = time.monotonic(), fast
            if now > deadline:
                print(f"{log}: no end after {LIMIT_SECONDS:.0f} s", file=sys.stderr)
                os.killpg(driver.pid, signal.SIGKILL)
                driver.wait()
                return None
            if now > due:
                current, due = [*fast, *slow], now + SLOW_TICK_SECONDS
                self.commits.look()
                reap(driver)
            if by_title and now > scan_due:  # a scan at the moment itself would be too slow
                scan_due = now + SCAN_SECONDS
                for title in by_title:
                    self._find(title, driver)
            for pair, reached in current:
                if reached():
                    self.pending.remove(pair)
                    return pair
            time.sleep(FAST_TICK_SECONDS if fast else SLOW_TICK_SECONDS)
        self.commits.look()
        return None

    def _kill(self, moment: Moment, delay: float, driver: "subprocess.Popen[bytes]") -> None:
        """Kill the victim after the delay; the moment is missed if the driver ends before."""
        end, victim = time.monotonic() + delay, moment.victim
        while time.monotonic() < end and driver.poll() is None:
            self.commits.look()
            time.sleep(FAST_TICK_SECONDS)
        if victim not in ON_DRIVER:
            while (found := self._find(victim, driver)) is None and driver.poll() is None:
                time.sleep(SLOW_TICK_SECONDS)
        if driver.poll() is not None:
            self.missed.append(moment)
            return
        if victim in ON_DRIVER:
            ON_DRIVER[victim](driver.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):  # `_next` reports a hang
                driver.wait(LIMIT_SECONDS)
        elif found:
            process, victim = found
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait(10)
        seconds = time.monotonic() - self.started
        kill = Kill(self.command.name, moment.step, moment.when, victim, seconds, delay, state_of(self.run))
        self.kills.append(kill)
        print(f"--- {kill.step}, {kill.when}: {kill.victim} ({kill.found})", file=sys.stderr, flush=True)

    def _find(self, title: str, driver: "subprocess.Popen[bytes]") -> tuple[psutil.Process, str] | None:
        """A descendant of the driver whose title matches, and its title."""
        known = self.known.get(title)
        if known and known[0].is_running():
            return known
        for process, found in children_of(driver):
            if re.match(title, found):
                self.known[title] = (process, found)
                return process, found
        return None


def start(command: Command, folder: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start a command in its own process group."""
    arguments = [str(CDPO), command.verb, f"{command.config}.yaml", *command.arguments]
    log.parent.mkdir(exist_ok=True)
    with log.open("wb") as handle:
        return subprocess.Popen(arguments, cwd=folder, stdout=handle, stderr=handle, start_new_session=True)


def reap(driver: "subprocess.Popen[bytes]") -> None:
    """Reap dead orphans: Ray's workers treat a zombie raylet as alive, and would not exit."""
    with contextlib.suppress(ChildProcessError):
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and dead.si_pid != driver.pid:
            os.waitpid(dead.si_pid, 0)


def children_of(driver: "subprocess.Popen[bytes]") -> list[tuple[psutil.Process, str]]:
    """All descendants of a driver, with their titles."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found.append((child, " ".join(child.cmdline()).strip()))
    return found


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def state_of(run: Path) -> str:
    """State of the interrupted step, from its files."""
    partials = [path for path in run.rglob("*.partial") if path.is_dir()]
    if partials:
        partial = max(partials, key=lambda path: path.stat().st_mtime)
        state = f"{partial.relative_to(run)}: "
        if (partial / MANIFEST).exists():
            return f"{state}{BETWEEN}"
        if (partial / "stages.json").exists() and partial.name.startswith(TRAINING):
            commits = "present" if any(partial.glob(f"commits/update-*/{MANIFEST}")) else "deleted"
            return f"{state}trained, no manifest, checkpoints {commits}"
        return f"{state}no manifest"
    left = [path.parent.name for path in run.rglob(SETTINGS)]
    return f"{left[0]}: renamed, {SETTINGS} left" if left else "no unfinished step"


BETWEEN = "manifest written, not renamed"


def end_all(seconds: float) -> list[str]:
    """Wait for all remaining processes of the commands; kill those that do not end and return their titles."""
    end = time.monotonic() + seconds
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < end:
        psutil.wait_procs(left, timeout=0.5)
    titles = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            titles.append(" ".join(process.cmdline())[:80])
            process.kill()
    psutil.wait_procs(left, timeout=5)
    return titles


def compared(quiet: Path, chaos: Path) -> tuple[dict[str, int], list[str]]:
    """Compare all files of two folders: number of identical files by folder, and one line for each that differs."""
    same: dict[str, int] = {}
    different = []
    files = [{str(path.relative_to(root)): path for path in contents_of(root)} for root in (quiet, chaos)]
    for name in sorted(files[0].keys() | files[1].keys()):
        where = "/".join(Path(name).parts[:2])
        if name not in files[1]:
            different.append(f"{name}: is missing")
        elif name not in files[0]:
            different.append(f"{name}: was left over")
        elif steady(files[0][name]) != steady(files[1][name]):
            different.append(f"{name}: differs")
        else:
            same[where] = same.get(where, 0) + 1
    for manifest in chaos.rglob(MANIFEST):
        try:
            RunFolder(manifest.parent.parent).refuse_damage(manifest.parent.name)
        except StoreError as error:
            different.append(str(error))
    return same, different


def contents_of(root: Path) -> Iterable[Path]:
    """Files that must be identical, and folders that must not remain."""
    for path in root.rglob("*"):
        if "tensorboard" in path.parts or path.name in (".lock", "status.json"):
            continue
        if path.is_file() or path.suffix == ".partial":
            yield path


TIMED = {"seconds", "created", "files", "fingerprint", "inputs"}
"""Keys of JSON files with times, or with hashes of files that contain times; the files are compared separately."""


def steady(path: Path) -> Any:
    """Content of a file without times, and without the order of metadata in safetensors files."""

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_times(each) for key, each in value.items() if key not in TIMED}
        return [without_times(each) for each in value] if isinstance(value, list) else value

    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix in (".html", ".md"):
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:+]+|\b\d+\.\d\b", "#", path.read_text())
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            words = sorted(re.findall(r"[\w.]+", json.dumps(file.metadata())))  # in random order
        return words, {name: (str(value.dtype), value.shape, value.tobytes()) for name, value in tensors.items()}
    return path.read_bytes() if path.is_file() else None


def described(command: Command, moment: Moment) -> str:
    return f"{command.name}: {moment.step}, {moment.when}: {moment.victim}"


def chosen(pattern: str, num_kills: int | None, seed: int) -> dict[Command, list[Moment]]:
    """The moments that match, or a random selection of ``num_kills`` of them, by command and in order."""
    known = [
        (command, moment)
        for command in COMMANDS
        for moment in command.moments
        if re.search(pattern, described(command, moment))
    ]
    if num_kills is not None and num_kills < len(known):
        known = [known[place] for place in sorted(random.Random(seed).sample(range(len(known)), num_kills))]
    found: dict[Command, list[Moment]] = {}
    for command, moment in known:
        found.setdefault(command, []).append(moment)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", default="", help="regular expression that selects moments, see --list")
    parser.add_argument("--kills", type=int, help="number of moments, selected by the seed; default: all")
    parser.add_argument("--min-kills", type=int, help="fail with fewer kills; default: 20, or all selected")
    parser.add_argument("--seed", type=int, default=0, help="seed of delays and selection")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/chaos"), help="output folder, emptied first; contains chaos.json"
    )
    parser.add_argument("--list", action="store_true", help="print the moments and exit")
    options = parser.parse_args()
    wanted = chosen(options.moments, options.kills, options.seed)
    num_wanted = sum(map(len, wanted.values()))
    if options.list:
        for command, moments in wanted.items():
            for moment in moments:
                print(described(command, moment))
        return
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:  # orphans are reparented to this process
        sys.exit("prctl(PR_SET_CHILD_SUBREAPER) failed")
    folder = options.dir.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_configs(folder)
    try:
        found = {"seed": options.seed} | disturb(wanted, folder, options.seed)
    finally:
        end_all(0)
    (folder / "chaos.json").write_text(json.dumps(found, indent=1))
    print_results(found, min(20, num_wanted) if options.min_kills is None else options.min_kills)


def disturb(wanted: dict[Command, list[Moment]], folder: Path, seed: int) -> dict[str, Any]:
    """Run the commands undisturbed and disturbed, for each configuration up to the last command with a moment.

    Returns:
        Content of `chaos.json`.
    """
    last = {command.config: place for place, command in enumerate(COMMANDS) if command in wanted}
    commands = [command for place, command in enumerate(COMMANDS) if place <= last.get(command.config, -1)]
    started = time.monotonic()
    for command in commands:
        with start(command, folder, log := folder / "logs" / "quiet.log") as process:
            pass
        if process.returncode:
            sys.exit(f"{log}: {command.name}: exit code {process.returncode}: {last_line(log)}")
    quiet_seconds = time.monotonic() - started
    (folder / "runs").rename(folder / "quiet")

    started = time.monotonic()
    disturbed = []
    for command in commands:
        moments = wanted.get(command, [])
        delays = [random.Random(f"{seed} {command.name} {each}").uniform(0, each.max_delay) for each in moments]
        disturbed.append(Disturbed(command, folder, moments, delays))
        disturbed[-1].survive()
    chaos_seconds = time.monotonic() - started

    left = end_all(END_SECONDS)
    kills = [kill for each in disturbed for kill in each.kills]
    renames = [kill.found for kill in kills if kill.when.endswith("final rename")]
    same, different = compared(folder / "quiet", folder / "runs")
    return {
        "seconds": {"quiet": round(quiet_seconds), "chaos": round(chaos_seconds)},
        "kills": [asdict(kill) for kill in kills],
        "missed": [described(each.command, moment) for each in disturbed for moment in each.missed],
        "failures": [line for each in disturbed for line in each.failures],
        "given_up": [each.command.name for each in disturbed if each.gave_up],
        "renames": {"hit": sum(state.endswith(BETWEEN) for state in renames), "tried": len(renames)},
        "updates_repeated": sum(each.commits.num_repeated for each in disturbed),
        "ended_by_sigterm": [
            {"step": kill.step, "exit_code": kill.exit_code} for kill in kills if kill.victim == TERMINATED
        ],
        "processes_left": left,
        "same": same,
        "different": different,
    }


def print_results(found: dict[str, Any], min_kills: int) -> None:
    """Print the table and the verdict.

    Raises:
        SystemExit: a check failed.
    """
    print(f"{'command':34} {'step':9} {'when':40} {'killed':38} {'s':>5} {'exit':>5}  state")
    for kill in found["kills"]:
        print(
            f"{kill['command'][:34]:34} {kill['step']:9} {kill['when']:40} {kill['victim'][:38]:38}"
            f" {kill['seconds']:5.0f} {kill['exit_code']:5d}  {kill['found']}"
        )
    for name in ("missed", "failures"):
        print(*(f"{name}: {line}" for line in found[name]), sep="\n", end="\n" * bool(found[name]))
    print(
        f"final renames: {found['renames']['hit']} of {found['renames']['tried']} kills hit between manifest and rename"
    )
    for where, count in found["same"].items():
        print(f"{where}: {count} identical files")
    print(f"seconds: {found['seconds']['quiet']} quiet, {found['seconds']['chaos']} under {len(found['kills'])} kills")
    faults = [
        *found["different"],
        *(f"{name}: failed {MAX_FAILURES} times without a kill" for name in found["given_up"]),
        *(f"still running: {title}" for title in found["processes_left"]),
        *(
            f"SIGTERM in {ended['step']}: exit code {ended['exit_code']}, not 143"
            for ended in found["ended_by_sigterm"]
            if ended["exit_code"] != 128 + signal.SIGTERM
        ),
    ]
    if found["updates_repeated"]:
        faults.append(f"{found['updates_repeated']} updates were repeated although a checkpoint contained them")
    if len(found["kills"]) < min_kills:
        faults.append(f"{len(found['kills'])} kills, fewer than {min_kills}")
    if faults:
        sys.exit("\n".join(["FAILED:", *faults]))
    print(f"{len(found['kills'])} kills: everything identical")


if __name__ == "__main__":
    main()

"""Progress of a step -> the bar, `status.json`, the log and the trackers."""

import contextlib
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from cdpo_ray.progress.pace import Pace, duration, rate_in_words
from cdpo_ray.progress.status import STATUS, read_status
from cdpo_ray.progress.trackers import Images, Metrics, TrackedRun, Trackers
from cdpo_ray.records import PREDICTED
from cdpo_ray.store import read_bytes, write_json

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 5.0  # between two writes of `status.json`
IDLE_SECONDS = 120.0  # without progress, before a line names what the step is waiting for; doubles each time
LINE_SECONDS = 60.0  # between two lines in the log, and between two measurements of the rate
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}{postfix}]"


def shows_bars() -> bool:
    """Whether standard error shows progress bars: a terminal or a notebook does, a file does not."""
    return sys.stderr.isatty() or type(sys.stderr).__module__ == "ipykernel.iostream"


class Progress:
    """Progress, metrics and log lines of one step at a time.

    On its own it draws a progress bar. As a context manager around a run it also writes `status.json` every
    `HEARTBEAT_SECONDS` and sends metrics to the trackers.

    Args:
        run: run whose folder holds `status.json`; ``None``: only a bar.
        tracking: options of the configured trackers, by name.
        command: command that resumes the run.
        num_rounds: number of rounds of the run.

    Raises:
        ConfigError: a package or a setting that a tracker needs is missing.
        StoreError: as `Trackers`, or `status.json` is damaged.
    """

    def __init__(
        self,
        run: TrackedRun | None = None,
        *,
        tracking: Mapping[str, Mapping[str, Any]] | None = None,
        command: str | None = None,
        num_rounds: int = 1,
    ) -> None:
        earlier = (read_status(run.dir) if run else None) or {}
        self._run_dir = run.dir if run else None
        self._file = _StatusFile(run.dir) if run else None
        self._trackers = Trackers(run, tracking or {}, earlier.get("run_ids")) if run else None
        self._about = {"command": command, "num_rounds": num_rounds, "pid": os.getpid(), "host": platform.node()}
        self._queue = _TrackingQueue(earlier.get("recorded", {}))
        self._state: dict[str, Any] = {"state": "running"}
        self._step = ""  # the step's verb with its round; empty before the first
        self._work = _Work()
        self._idle = _Idle()
        self._lock = threading.RLock()  # never held during I/O
        self._finished = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._write()
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._finished.set()
        self._heartbeat.join()
        if error is None:
            self._state = {"state": "ended"}
        elif isinstance(error, Exception):
            self._state |= {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        else:
            self._state |= {"state": "stopped"}
        self._send()
        if self._trackers:
            self._trackers.close(self._state["state"])
        self._write()

    @contextlib.contextmanager
    def step(
        self,
        verb: str,
        folder: str,
        *,
        round: int = 1,
        predicted: Mapping[str, Any] | None = None,
        waiting_for: str = "its workers",
    ) -> Iterator[None]:
        """Context manager around a step of the run.

        Args:
            verb: name of the step, such as `train`.
            folder: folder of the step within the run.
            round: 1-based.
            predicted: estimate to compare with, see `records.PREDICTED`, if any.
            waiting_for: the step's workers in words, for the log line after `IDLE_SECONDS` without progress.
        """
        started = time.monotonic()
        with self._lock:
            self._step = step = f"round-{round}/{verb}" if self._about["num_rounds"] != 1 else verb
            self._work = _Work(verb, step)
            self._state = {"state": "running", "folder": folder, "round": round}
            self._idle = _Idle(waiting_for)
            if predicted:
                self._state[PREDICTED] = dict(predicted)
        self._write()
        try:
            yield
        finally:
            self._idle = _Idle()
            self.end()
        with self._lock:
            self._queue.add(Metrics(step, self._state.get("done", 0), {"seconds": time.monotonic() - started}))
            self._state = {"state": "running"}

    def begin(self, verb: str, *, total: int, unit: str, done: int = 0, makes: tuple[int, str] | None = None) -> None:
        """Start a step, or resume it.

        Args:
            verb: name of the step, such as `train`.
            total: number of units.
            unit: name of one unit, such as `prompt` or `update`.
            done: number of units that were done before.
            makes: number and name of what a unit produces, to report the rate in: ``(8, "images")``.
        """
        self.end()
        with self._lock:
            step = self._step or verb
            pace = Pace(time.monotonic(), total=total, done=done)
            self._work = _Work(verb, step, unit, makes or (1, f"{unit}s"), pace)
            self._idle.note_progress()
            first = self._queue.resume(step, done)
        if self._trackers:
            self._trackers.begin(step, first)
        self._work.bar = tqdm(total=total, initial=done, desc=verb, unit=unit, bar_format=BAR, disable=not shows_bars())

    def advance(self, num: int = 1) -> None:
        """Add to the number of finished units; negative if some must be repeated."""
        with self._lock:
            if self._work.pace and num:
                self._work.pace.advance(num, time.monotonic())
                self._idle.note_progress()
        if self._work.bar is not None:
            self._work.bar.update(num)

    def record(self, values: Mapping[str, float], *, update: int) -> None:
        """Record metrics of one training update of the current step.

        Updates come in order. An update that this or an earlier process has recorded is skipped, so that a restart may
        record all of its updates.

        Args:
            values: metrics by name.
            update: 1-based.
        """
        with self._lock:
            self._queue.add_update(Metrics(self._work.step, update, dict(values)))

    def record_images(self, pngs: Mapping[str, bytes], *, update: int) -> None:
        """Record images that were sampled after a training update; skipped if recorded, as by `record`.

        Args:
            pngs: content of a PNG by prompt.
            update: 1-based; 0: before the first update.
        """
        with self._lock:
            self._queue.add_update(Images(self._work.step, update, dict(pngs)))

    def log_page(self, path: Path) -> None:
        """Send a page of the run, such as its report, to the trackers.

        Args:
            path: path of a self-contained HTML page in the run's folder.
        """
        if self._run_dir and self._trackers:
            self._trackers.log_page(str(path.relative_to(self._run_dir)), read_bytes(path))

    def log_line(self, line: str) -> None:
        """Write a line to the log and to `status.json`."""
        log.info(line)
        self._state["line"] = line

    def end(self) -> None:
        """End the step, finished or not."""
        if self._work.bar is not None:
            self._work.bar.close()
        with self._lock:
            self._note_rate()
            self._state |= self._work.reached
            self._work = _Work(self._work.verb, self._work.step, self._work.unit, self._work.makes)
        self._send()
        self._write()

    def _beat(self) -> None:
        while not self._finished.wait(HEARTBEAT_SECONDS):
            with self._lock:
                work, now = self._work, time.monotonic()
                if work.pace and now > work.line_due:
                    work.line_due = now + LINE_SECONDS
                    self._note_rate()
                    if not shows_bars():
                        log.info("%s: %s", work.verb, work.sentence(now))
                if work.pace and work.bar is not None:
                    left = work.pace.seconds_left(now)
                    work.bar.set_postfix_str(f"{duration(left)} left" if left is not None else "")
                if idle := self._idle.seconds_to_report():
                    reached = f" at {work.done}" if work.pace else ""
                    self.log_line(
                        f"{work.verb}: no progress for {duration(idle)}{reached}; waiting for {self._idle.waiting_for}"
                    )
            self._send()
            self._write()

    def _note_rate(self) -> None:
        if metrics := self._work.rate(time.monotonic()):
            self._queue.add(metrics)

    def _send(self) -> None:
        """Send collected metrics and images to the trackers; `status.json` records them once they are sent."""
        with self._lock:
            entries, mark_recorded = self._queue.take()

        def mark() -> None:
            with self._lock:
                mark_recorded()
            self._write()

        if entries and self._trackers:
            self._trackers.log(entries, mark)

    def _write(self) -> None:
        if self._file is None:
            return

        def status() -> dict[str, Any]:
            with self._lock:
                now, pace = time.monotonic(), self._work.pace
                found = self._about | self._state | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
                if pace:
                    found |= {"rate": pace.rate(now), "seconds_left": pace.seconds_left(now)}
                return (
                    found
                    | self._work.reached
                    | {
                        "recorded": dict(self._queue.recorded),
                        "run_ids": self._trackers.run_ids if self._trackers else {},
                    }
                )

        self._file.write(status)


@dataclass
class _Work:
    """The work of a step that is counted.

    Attributes:
        verb, step: name of the step, and the same with its round.
        makes: number and name of what a unit produces.
        pace: number of finished units and their rate; ``None``: nothing is being counted.
        line_due: time of the next line in the log.
    """

    verb: str = ""
    step: str = ""
    unit: str = ""
    makes: tuple[int, str] = (1, "")
    pace: Pace | None = None
    bar: tqdm | None = None
    line_due: float = field(default_factory=lambda: time.monotonic() + LINE_SECONDS)

    @property
    def reached(self) -> dict[str, Any]:
        """Keys of `status.json`."""
        return {"done": self.pace.done, "total": self.pace.total, "unit": self.unit} if self.pace else {}

    @property
    def done(self) -> str:
        return f"{self.pace.done}/{self.pace.total} {self.unit}s" if self.pace else ""

    def sentence(self, now: float) -> str:
        """Number of finished units, rate and time left, as far as they are known."""
        rate, left = (self.pace.rate(now), self.pace.seconds_left(now)) if self.pace else (None, None)
        if not rate or left is None:
            return self.done
        return f"{self.done}, {rate_in_words(rate, self.unit)}, {duration(left)} left"

    def rate(self, now: float) -> Metrics | None:
        """The rate as metrics; ``None``: not known."""
        if self.pace is None or not (rate := self.pace.rate(now)):
            return None
        per_unit, what = self.makes
        return Metrics(self.step, self.pace.done, {f"{what}_per_second": rate * per_unit})


class _Idle:
    """Time without progress, reported at doubling intervals from `IDLE_SECONDS`.

    Args:
        waiting_for: what a step waits for, in words; empty: no step runs.
    """

    def __init__(self, waiting_for: str = "") -> None:
        self.waiting_for = waiting_for
        self.note_progress()

    def note_progress(self) -> None:
        self.last_progress, self.due = time.monotonic(), IDLE_SECONDS

    def seconds_to_report(self) -> float | None:
        """Seconds without progress, if it is time to report them."""
        idle = time.monotonic() - self.last_progress
        if not self.waiting_for or idle <= self.due:
            return None
        self.due = 2 * idle
        return idle


class _TrackingQueue:
    """Metrics and images that the trackers do not have yet.

    Args:
        recorded: last update that the trackers have, by step.
    """

    def __init__(self, recorded: Mapping[str, int]) -> None:
        self.recorded = dict(recorded)
        self.queued = dict(recorded)  # the same, including metrics that are not sent yet
        self.entries: list[Metrics | Images] = []

    def resume(self, step: str, done: int) -> int:
        """First update to record of a step that has done some; a restarted step records its metrics again."""
        known = self.recorded.get(step, done) if done else 0
        if step in self.recorded:
            self.queued[step] = self.recorded[step] = known
        if not done:
            for counts in (self.queued, self.recorded):
                counts.pop(_images_of(step), None)
        return known + 1

    def add(self, entry: Metrics | Images) -> None:
        self.entries.append(entry)

    def add_update(self, entry: Metrics | Images) -> None:
        """Add metrics or images of an update, unless they are recorded or queued."""
        key = entry.step if isinstance(entry, Metrics) else _images_of(entry.step)
        if entry.index > self.queued.get(key, -1):
            self.queued[key] = entry.index
            self.add(entry)

    def take(self) -> tuple[list[Metrics | Images], Callable[[], None]]:
        """Everything that is queued, and a function to call once it is recorded."""
        entries, self.entries = self.entries, []
        queued = dict(self.queued)

        def mark_recorded() -> None:
            self.recorded = queued

        return entries, mark_recorded


def _images_of(step: str) -> str:
    """Key of the last update whose images the trackers have."""
    return f"{step}/images"


class _StatusFile:
    """`status.json` of a run; a failure to write it is one warning and never stops the run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATUS
        self.is_writable = True
        self.lock = threading.Lock()

    def write(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """Write what ``status`` returns; writes are in order."""
        with self.lock:
            values = status()
            try:
                write_json(self.path, values)
            except Exception as error:
                if self.is_writable:
                    log.warning("%s: cannot be written, the run continues: %s", self.path, error)
                self.is_writable = False

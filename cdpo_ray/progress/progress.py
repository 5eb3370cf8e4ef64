"""Progress of a step -> the bar, `status.json`, the log and the trackers."""

import contextlib
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from tqdm import tqdm

from cdpo_ray.progress.pace import Pace, duration, rate_in_words
from cdpo_ray.progress.status import STATUS, read_status
from cdpo_ray.progress.trackers import Metrics, TrackedRun, Trackers
from cdpo_ray.records import PREDICTED
from cdpo_ray.store import write_json

log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 5.0  # between two writes of `status.json`
IDLE_SECONDS = 120.0  # without progress, before a line names what the step is waiting for; doubles each time
LINE_SECONDS = 60.0  # between two lines in the log, and between two measurements of the rate
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}{postfix}]"


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
        self._dir = run.dir if run else None
        self._trackers = Trackers(run, tracking or {}, earlier.get("run_ids")) if run else None
        self._about = {"command": command, "num_rounds": num_rounds, "pid": os.getpid(), "host": platform.node()}
        self._recorded: dict[str, int] = earlier.get("recorded", {})  # last update that the trackers have, by step
        self._queued = dict(self._recorded)  # the same, including metrics that are not sent yet
        self._metrics: list[Metrics] = []
        self._state: dict[str, Any] = {"state": "running"}
        self._verb = self._step = ""
        self._pace: Pace | None = None
        self._unit, self._makes = "", (1, "")
        self._bar: tqdm | None = None
        self._line_due = 0.0
        self._waiting_for = ""
        self._last_progress, self._idle_due = time.monotonic(), IDLE_SECONDS
        self._writable = True
        self._lock = threading.RLock()  # never held during I/O
        self._writing = threading.Lock()
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
            self._verb, self._step = verb, f"round-{round}/{verb}" if self._about["num_rounds"] != 1 else verb
            self._state = {"state": "running", "folder": folder, "round": round}
            self._waiting_for = waiting_for
            self._note_progress()
            if predicted:
                self._state[PREDICTED] = dict(predicted)
        self._write()
        try:
            yield
        finally:
            self._waiting_for = ""
            self.end()
        with self._lock:
            self._metrics.append(
                Metrics(self._step, self._state.get("done", 0), {"seconds": time.monotonic() - started})
            )
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
        step = self._step or verb
        self.end()
        with self._lock:
            self._verb, self._unit, self._makes = verb, unit, makes or (1, f"{unit}s")
            self._pace = Pace(time.monotonic(), total=total, done=done)
            self._line_due = time.monotonic() + LINE_SECONDS
            self._note_progress()
            known = self._recorded.get(step, done) if done else 0  # a restarted step records its metrics again
            if step in self._recorded:
                self._queued[step] = self._recorded[step] = known
        if self._trackers:
            self._trackers.begin(step, known + 1)
        self._bar = tqdm(
            total=total, initial=done, desc=verb, unit=unit, bar_format=BAR, disable=not sys.stderr.isatty()
        )

    def advance(self, num: int = 1) -> None:
        """Add to the number of finished units; negative if some must be repeated."""
        with self._lock:
            if self._pace and num:
                self._pace.advance(num, time.monotonic())
                self._note_progress()
        if self._bar is not None:
            self._bar.update(num)

    def record(self, values: Mapping[str, float], *, update: int) -> None:
        """Record metrics of one training update of the current step.

        Updates come in order. An update that this or an earlier process has recorded is skipped, so that a restart may
        record all of its updates.

        Args:
            values: metrics by name.
            update: 1-based.
        """
        step = self._step or self._verb
        with self._lock:
            if update > self._queued.get(step, 0):
                self._queued[step] = update
                self._metrics.append(Metrics(step, update, dict(values)))

    def log_line(self, line: str) -> None:
        """Write a line to the log and to `status.json`."""
        log.info(line)
        self._state["line"] = line

    def end(self) -> None:
        """End the step, finished or not."""
        if self._bar is not None:
            self._bar.close()
        with self._lock:
            self._note_rate()
            self._state |= self._reached()
            self._bar = self._pace = None
        self._send()
        self._write()

    def _note_progress(self) -> None:
        self._last_progress, self._idle_due = time.monotonic(), IDLE_SECONDS

    def _log_idle(self) -> None:
        """Log that there is no progress and what the step is waiting for, at doubling intervals from `IDLE_SECONDS`."""
        idle = time.monotonic() - self._last_progress
        if self._waiting_for and idle > self._idle_due:
            self._idle_due = 2 * idle
            reached = f" at {self._pace.done}/{self._pace.total} {self._unit}s" if self._pace else ""
            self.log_line(f"{self._verb}: no progress for {duration(idle)}{reached}; waiting for {self._waiting_for}")

    def _beat(self) -> None:
        while not self._finished.wait(HEARTBEAT_SECONDS):
            with self._lock:
                pace = self._pace
                if pace and time.monotonic() > self._line_due:
                    self._line_due = time.monotonic() + LINE_SECONDS
                    self._note_rate()
                    if not sys.stderr.isatty():
                        log.info("%s: %s", self._verb, self._sentence(pace))
                if pace and self._bar is not None:
                    left = pace.seconds_left(time.monotonic())
                    self._bar.set_postfix_str(f"{duration(left)} left" if left is not None else "")
                self._log_idle()
            self._send()
            self._write()

    def _sentence(self, pace: Pace) -> str:
        now = time.monotonic()
        rate, left = pace.rate(now), pace.seconds_left(now)
        done = f"{pace.done}/{pace.total} {self._unit}s"
        return (
            f"{done}, {rate_in_words(rate, self._unit)}, {duration(left)} left" if rate and left is not None else done
        )

    def _note_rate(self) -> None:
        if self._pace and (rate := self._pace.rate(time.monotonic())):
            per_unit, what = self._makes
            self._metrics.append(
                Metrics(self._step or self._verb, self._pace.done, {f"{what}_per_second": rate * per_unit})
            )

    def _reached(self) -> dict[str, Any]:
        return {"done": self._pace.done, "total": self._pace.total, "unit": self._unit} if self._pace else {}

    def _send(self) -> None:
        """Send collected metrics to the trackers; `status.json` records them once they are sent."""
        with self._lock:
            metrics, self._metrics = self._metrics, []
            queued = dict(self._queued)

        def mark_recorded() -> None:
            with self._lock:
                self._recorded = queued
            self._write()

        if metrics and self._trackers:
            self._trackers.log(metrics, mark_recorded)

    def _write(self) -> None:
        if self._dir is None:
            return
        with self._writing:
            with self._lock:
                now = time.monotonic()
                status = self._about | self._state | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
                if self._pace:
                    status |= {"rate": self._pace.rate(now), "seconds_left": self._pace.seconds_left(now)}
                status |= self._reached()
                status |= {
                    "recorded": dict(self._recorded),
                    "run_ids": self._trackers.run_ids if self._trackers else {},
                }
            try:
                write_json(self._dir / STATUS, status)
            except Exception as error:  # a failure of monitoring must not stop the run
                if self._writable:
                    log.warning("%s: cannot be written, the run continues: %s", self._dir / STATUS, error)
                self._writable = False

"""How far a step is: told once, to all that watch a run."""

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
HEARTBEAT_SECONDS = 5.0  # between two signs of life in `status.json`
IDLE_SECONDS = 120.0  # without progress, before a line names what is waited for; then twice as long
LINE_SECONDS = 60.0  # between two lines in a log, and two points of a rate
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}s [{elapsed}{postfix}]"


class Progress:
    """One step at a time: how much of it is done, what was measured, and lines for people.

    Alone it draws a bar. As a context around a run it also writes `status.json`, every few seconds as long as the
    process lives, and tells the trackers.

    Args:
        run: whose folder `status.json` is in.
        tracking: options of trackers that were asked for, by name.
        command: what goes on with the run.
        num_rounds: of the run.

    Raises:
        ConfigError: what a tracker needs is not installed or not given.
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
        self._told: dict[str, int] = earlier.get("recorded", {})  # by place, the last update that trackers keep
        self._taken = dict(self._told)  # the same, of those that are on their way too
        self._points: list[Metrics] = []
        self._state: dict[str, Any] = {"state": "running"}
        self._verb = self._place = ""
        self._pace: Pace | None = None
        self._unit, self._makes = "", (1, "")
        self._bar: tqdm | None = None
        self._line_due = 0.0
        self._waits_for = ""
        self._moved, self._idle_due = time.monotonic(), IDLE_SECONDS
        self._writable = True
        self._lock = threading.RLock()  # never held while something is written
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._heart = threading.Thread(target=self._live, name="progress", daemon=True)

    def __enter__(self) -> "Progress":
        self._write()
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._heart.join()
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
        """The block is a step of the run.

        Args:
            round: 1-based.
            waiting_for: what works on it, named once nothing has progressed for a while.
            predicted: estimate to compare with, see `records.PREDICTED`; ``None``: there is none.
        """
        started = time.monotonic()
        with self._lock:
            self._verb, self._place = verb, f"round-{round}/{verb}" if self._about["num_rounds"] != 1 else verb
            self._state = {"state": "running", "folder": folder, "round": round}
            self._waits_for = waiting_for
            self._move()
            if predicted:
                self._state[PREDICTED] = dict(predicted)
        self._write()
        try:
            yield
        finally:
            self._waits_for = ""
            self.end()
        with self._lock:
            self._points.append(
                Metrics(self._place, self._state.get("done", 0), {"seconds": time.monotonic() - started})
            )
            self._state = {"state": "running"}

    def begin(self, verb: str, *, total: int, unit: str, done: int = 0, makes: tuple[int, str] | None = None) -> None:
        """A step begins, or goes on with `done` of its `total` units done before.

        Args:
            unit: one of them: `prompt`, `update`.
            makes: how many of what a unit makes, if its rate is told in these: ``(8, "images")``.
        """
        place = self._place or verb
        self.end()
        with self._lock:
            self._verb, self._unit, self._makes = verb, unit, makes or (1, f"{unit}s")
            self._pace = Pace(time.monotonic(), total=total, done=done)
            self._line_due = time.monotonic() + LINE_SECONDS
            self._move()
            known = self._told.get(place, done) if done else 0  # what begins anew is told anew
            if place in self._told:
                self._taken[place] = self._told[place] = known
        if self._trackers:
            self._trackers.begin(place, known + 1)
        self._bar = tqdm(
            total=total, initial=done, desc=verb, unit=unit, bar_format=BAR, disable=not sys.stderr.isatty()
        )

    def advance(self, num: int = 1) -> None:
        """So many units more are done; fewer than none, if some are to be done again."""
        with self._lock:
            if self._pace and num:
                self._pace.advance(num, time.monotonic())
                self._move()
        if self._bar is not None:
            self._bar.update(num)

    def record(self, values: Mapping[str, float], *, update: int) -> None:
        """What was measured in one update of training, or after it, once the step has begun.

        Updates come in order. One that was recorded before, by an earlier process too, is passed over: a restart may
        tell all that it knows.
        """
        place = self._place or self._verb
        with self._lock:
            if update > self._taken.get(place, 0):
                self._taken[place] = update
                self._points.append(Metrics(place, update, dict(values)))

    def log_line(self, line: str) -> None:
        """A line in the log."""
        log.info(line)
        self._state["line"] = line

    def end(self) -> None:
        """The step is over, well or not."""
        if self._bar is not None:
            self._bar.close()
        with self._lock:
            self._note_rate()
            self._state |= self._reached()
            self._bar = self._pace = None
        self._send()
        self._write()

    def _move(self) -> None:
        self._moved, self._idle_due = time.monotonic(), IDLE_SECONDS

    def _tell_idle(self) -> None:
        """Say that nothing progresses, and what is waited for: after `IDLE_SECONDS`, then after twice as long."""
        idle = time.monotonic() - self._moved
        if self._waits_for and idle > self._idle_due:
            self._idle_due = 2 * idle
            reached = f" at {self._pace.done}/{self._pace.total} {self._unit}s" if self._pace else ""
            self.log_line(f"{self._verb}: no progress for {duration(idle)}{reached}; waiting for {self._waits_for}")

    def _live(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
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
                self._tell_idle()
            self._send()
            self._write()

    def _sentence(self, pace: Pace) -> str:
        now = time.monotonic()
        rate, left = pace.rate(now), pace.seconds_left(now)
        told = f"{pace.done}/{pace.total} {self._unit}s"
        return (
            f"{told}, {rate_in_words(rate, self._unit)}, {duration(left)} left" if rate and left is not None else told
        )

    def _note_rate(self) -> None:
        if self._pace and (rate := self._pace.rate(time.monotonic())):
            per_unit, what = self._makes
            self._points.append(
                Metrics(self._place or self._verb, self._pace.done, {f"{what}_per_second": rate * per_unit})
            )

    def _reached(self) -> dict[str, Any]:
        return {"done": self._pace.done, "total": self._pace.total, "unit": self._unit} if self._pace else {}

    def _send(self) -> None:
        """Tell the trackers what has come together; once they know, so does `status.json`."""
        with self._lock:
            points, self._points = self._points, []
            taken = dict(self._taken)

        def told() -> None:
            with self._lock:
                self._told = taken
            self._write()

        if points and self._trackers:
            self._trackers.log(points, told)

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
                status |= {"recorded": dict(self._told), "run_ids": self._trackers.run_ids if self._trackers else {}}
            try:
                write_json(self._dir / STATUS, status)
            except Exception as error:  # watching must stop nothing
                if self._writable:
                    log.warning("%s: cannot be written, the run goes on: %s", self._dir / STATUS, error)
                self._writable = False

"""Progress, heartbeats and errors of training workers, and the stop flag; an actor that the driver creates."""

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FRESH_SECONDS = 3.0  # age of a heartbeat from which it is not posted, and the next worker of the node posts
SILENT_SHOWN = 3


@dataclass(frozen=True)
class Cursor:
    """Position of the driver: last update whose record it has read, number of log lines and of stages read."""

    update: int = 0
    num_lines: int = 0
    num_stages: int = 0


@dataclass(frozen=True)
class News:
    """Updates since the last poll.

    Attributes:
        num_updates: total number of updates done.
        num_kept: number of updates in the newest checkpoint, which a restart does not repeat.
        records: one record per update since the cursor, in order.
        lines: log lines since the cursor.
        summaries: summaries of the stages that have ended since the cursor.
        silent: workers without a recent heartbeat, by rank: location, seconds since the last one.
        fault: class and message of an error of ours that a restart cannot fix.
        cursor: position after this poll.
    """

    num_updates: int
    num_kept: int
    records: Sequence[dict[str, float]] = ()
    lines: Sequence[str] = ()
    summaries: Sequence[dict[str, Any]] = ()
    silent: dict[int, tuple[str, float]] = field(default_factory=dict)
    fault: tuple[str, str] | None = None
    cursor: Cursor = Cursor()


class Board:
    """Workers post, the driver polls; no call blocks."""

    def __init__(self) -> None:
        self.num_updates = self.num_kept = 0
        self.records: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []
        self.summaries: Sequence[dict[str, Any]] = ()
        self.heartbeats: dict[int, tuple[str, float]] = {}
        self.fault: tuple[str, str] | None = None
        self.stopping = False

    def heartbeats_of(self, ages: Mapping[int, tuple[str, float]]) -> bool:
        """Record the heartbeats of a node's workers; return the stop flag.

        Args:
            ages: location and seconds since the last heartbeat, by rank.
        """
        now = time.monotonic()
        for rank, (where, age) in ages.items():
            self.heartbeats[rank] = (where, now - age)
        return self.stopping

    def leave(self, worker_rank: int) -> None:
        """Stop expecting heartbeats of a worker that ends."""
        self.heartbeats.pop(worker_rank, None)

    def post_update(self, num_updates: int) -> None:
        self.num_updates = num_updates

    def post_checkpoint(
        self,
        num_updates: int,
        records: Sequence[dict[str, float]],
        summaries: Sequence[dict[str, Any]],
        lines: Sequence[str] = (),
        *,
        first: tuple[int, int] = (0, 0),
    ) -> bool:
        """A checkpoint is written; records posted again after a restart replace the earlier ones.

        Args:
            num_updates: number of updates in the checkpoint.
            records: records of its updates.
            summaries: summaries of stages that have ended.
            lines: new log lines.
            first: number of earlier records and of earlier summaries, which were posted before.

        Returns:
            ``False``: this board lacks earlier ones, because Ray has restarted it, and takes nothing; post all of them.
        """
        if len(self.records) < first[0] or len(self.summaries) < first[1]:
            return False
        self.num_updates = self.num_kept = num_updates
        self.records |= {int(record["update"]): record for record in records}
        self.summaries = [*self.summaries[: first[1]], *summaries]
        self.lines += lines
        return True

    def post_line(self, line: str) -> None:
        self.lines.append(line)

    def post_fault(self, kind: str, message: str) -> None:
        self.fault = self.fault or (kind, message)

    def has_fault(self) -> bool:
        return self.fault is not None

    def ask_to_stop(self) -> None:
        """Set the stop flag: workers stop at the end of the current update."""
        self.stopping = True

    def read(self, cursor: Cursor, *, silent_seconds: float) -> News:
        """News since a cursor; a board restarted by Ray has fewer lines than the cursor, and returns all of them.

        Args:
            silent_seconds: age of the last heartbeat from which a worker is reported as silent.
        """
        now = time.monotonic()
        ages = {rank: (where, now - last) for rank, (where, last) in self.heartbeats.items()}
        records = [record for update, record in self.records.items() if update > cursor.update]
        summaries = self.summaries[cursor.num_stages :]
        return News(
            self.num_updates,
            self.num_kept,
            records,
            self.lines[cursor.num_lines if cursor.num_lines <= len(self.lines) else 0 :],
            summaries,
            {rank: (where, age) for rank, (where, age) in ages.items() if age > silent_seconds},
            self.fault,
            Cursor(
                int(records[-1]["update"]) if records else cursor.update,
                len(self.lines),
                cursor.num_stages + len(summaries),
            ),
        )


class NodeHeartbeats:
    """Heartbeats of the workers of one node, posted in one call by the first of them that is alive.

    Each worker touches an empty file of its own. Its modification time is `time.monotonic`, which all processes of a
    machine share. A worker that stops is not posted any more, and ages on the board; if it was the first, the next one
    posts.

    Args:
        folder: folder of one fit on one node; created, and deleted by the last worker that leaves.
        post: calls `Board.heartbeats_of`.
    """

    def __init__(self, folder: Path, worker_rank: int, post: Callable[[Mapping[int, tuple[str, float]]], bool]) -> None:
        self.folder, self.post = folder, post
        self.file = folder / f"{worker_rank}-{os.getpid()}"

    def beat(self) -> bool:
        """Record a heartbeat, and post those of the node if this is its first worker; returns the stop flag."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        now, stop = time.monotonic(), self.folder / "stop"
        self.file.touch(mode=0o600)
        os.utime(self.file, (now, now))
        ages = {}
        for file in self.folder.glob("*-*"):
            with contextlib.suppress(FileNotFoundError):
                age = now - file.stat().st_mtime
                rank, _, pid = file.name.partition("-")
                if age < FRESH_SECONDS:
                    ages[int(rank)] = (f"pid {pid} on {platform.node()}", max(age, 0.0))
        if self.file.name.startswith(f"{min(ages)}-") and self.post(ages):
            stop.touch(mode=0o600)
        return stop.exists()

    def leave(self) -> None:
        self.file.unlink(missing_ok=True)
        if not any(self.folder.glob("*-*")):
            shutil.rmtree(self.folder, ignore_errors=True)


def silence_of(silent: Mapping[int, tuple[str, float]]) -> list[str]:
    """Lines about workers without heartbeat, see `News.silent`: one each, or one about all of them if they are many."""
    if len(silent) <= SILENT_SHOWN:
        return [f"worker {rank} ({where}): no heartbeat for {age:.0f} s" for rank, (where, age) in silent.items()]
    hosts = [*dict.fromkeys(where.rpartition(" on ")[2] for where, _ in silent.values())]
    workers = [f"worker {rank} ({where})" for rank, (where, _) in silent.items()]
    return [
        f"{len(silent)} workers on {len(hosts)} nodes ({_first(hosts)}): no heartbeat for"
        f" {max(age for _, age in silent.values()):.0f} s; {_first(workers)}"
    ]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:SILENT_SHOWN]) + ", ..." * (len(names) > SILENT_SHOWN)


def error_of(posted: tuple[str, str]) -> Any:
    """The error that a worker posted."""
    from cdpo_ray import errors

    kind, message = posted
    return getattr(errors, kind)(message)

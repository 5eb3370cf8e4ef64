"""Progress, heartbeats and errors of training workers, and the stop flag; an actor that the driver creates."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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

    def heartbeat(self, worker_rank: int, where: str) -> bool:
        """Record a worker's heartbeat; return the stop flag."""
        self.heartbeats[worker_rank] = (where, time.monotonic())
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
    ) -> None:
        """A checkpoint is written; records posted again after a restart replace the earlier ones.

        Args:
            num_updates: number of updates in the checkpoint.
            records: records of all its updates.
            summaries: summaries of all stages that have ended.
            lines: new log lines.
        """
        self.num_updates = self.num_kept = num_updates
        self.records |= {int(record["update"]): record for record in records}
        self.summaries = summaries
        self.lines += lines

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


def error_of(posted: tuple[str, str]) -> Any:
    """The error that a worker posted."""
    from cdpo_ray import errors

    kind, message = posted
    return getattr(errors, kind)(message)

"""Where workers write how far they are and that they live, and read whether to stop; an actor that the driver makes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class News:
    """What the driver has not heard yet.

    Attributes:
        num_updates: done in all.
        num_kept: of them, what a restart would not do again.
        records: of updates, in order.
        lines: for the log.
        num_lines: of all there are.
        summaries: of stages that have ended.
        silent: workers that have given no sign for long, by rank: where each runs, and for how many seconds.
        fault: what no restart can mend: class and message of an error of ours.
    """

    num_updates: int
    num_kept: int
    records: Sequence[dict[str, float]]
    lines: Sequence[str]
    num_lines: int
    summaries: Sequence[dict[str, Any]] = ()
    silent: dict[int, tuple[str, float]] = field(default_factory=dict)
    fault: tuple[str, str] | None = None


class Board:
    """Workers post, the driver reads; nobody waits for it."""

    def __init__(self) -> None:
        self.num_updates = self.num_kept = 0
        self.records: dict[int, dict[str, float]] = {}
        self.lines: list[str] = []
        self.summaries: Sequence[dict[str, Any]] = ()
        self.beats: dict[int, tuple[str, float]] = {}
        self.fault: tuple[str, str] | None = None
        self.stopping = False

    def beat(self, worker_rank: int, where: str) -> bool:
        """A worker lives; whether it is to stop."""
        self.beats[worker_rank] = (where, time.monotonic())
        return self.stopping

    def leave(self, worker_rank: int) -> None:
        """A worker ends, of its own will."""
        self.beats.pop(worker_rank, None)

    def post_update(self, num_updates: int) -> None:
        self.num_updates = num_updates

    def post_commit(
        self,
        num_updates: int,
        records: Sequence[dict[str, float]],
        summaries: Sequence[dict[str, Any]],
        lines: Sequence[str] = (),
    ) -> None:
        """A commit is in place; records that were posted before a restart are not new.

        Args:
            summaries: of all stages that have ended.
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
        """At the end of the update that runs."""
        self.stopping = True

    def read(self, *, after_update: int, num_lines_seen: int, num_stages_seen: int, silent_seconds: float) -> News:
        """News since an update, a line and a stage; of a board that began anew, since its first line."""
        now = time.monotonic()
        silent = {
            rank: (where, now - heard) for rank, (where, heard) in self.beats.items() if now - heard > silent_seconds
        }
        records = [record for update, record in self.records.items() if update > after_update]
        lines = self.lines[num_lines_seen if num_lines_seen <= len(self.lines) else 0 :]
        ended = self.summaries[num_stages_seen:]
        return News(self.num_updates, self.num_kept, records, lines, len(self.lines), ended, silent, self.fault)


def fault_of(told: tuple[str, str]) -> Any:
    """The error that a worker posted."""
    from cdpo_ray import errors

    kind, message = told
    return getattr(errors, kind)(message)

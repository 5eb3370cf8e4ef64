"""Points -> event files in ``<run>/tensorboard``, a folder a step."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from cdpo_ray.progress.trackers import Metrics, TrackedRun
from cdpo_ray.store import copy, is_local, path_within


class TensorBoard:
    """A file a step and process, so that what a restart tells again is purged from that step alone.

    Events are written at once: what tensorboardX's `SummaryWriter` has in its queue, a kill would lose.
    """

    run_id = None

    def __init__(self, run: TrackedRun, options: Mapping[str, Any], run_id: str | None) -> None:
        self._dir = path_within(run.dir, "tensorboard")
        # an object cannot be appended to: a file is written here, and copied whole
        self._local_dir = self._dir if is_local(self._dir) else Path(tempfile.mkdtemp(prefix="cdpo-tensorboard-"))
        self._files: dict[str, EventsWriter] = {}

    def begin(self, place: str, at: int) -> None:
        if place in self._files:
            self._files[place].close()
        folder = path_within(self._local_dir, place)
        folder.mkdir(parents=True, exist_ok=True)
        self._files[place] = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._write(place, at, session_log=SessionLog(status=SessionLog.START))  # TensorBoard forgets what is from `at`

    def log(self, points: Sequence[Metrics]) -> None:
        for point in points:
            if point.place not in self._files:
                self.begin(point.place, point.at)
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._write(point.place, point.at, summary=Summary(value=values))
        for place in {point.place for point in points}:
            self._files[place].flush()
            if self._local_dir != self._dir:
                for path in (self._local_dir / place).iterdir():
                    copy(path, self._dir / place / path.name)

    def close(self, state: str) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, place: str, at: int, **what: Any) -> None:
        self._files[place].write_event(Event(wall_time=time.time(), step=at, **what))

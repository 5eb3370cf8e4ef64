"""Metrics -> event files in ``<run>/tensorboard``, one folder per step."""

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
    """Writes one file per step and process, so that a restart purges repeated events of that step only.

    Events are written immediately: a kill would lose the queue of tensorboardX's `SummaryWriter`.
    """

    run_id = None

    def __init__(self, run: TrackedRun, options: Mapping[str, Any], run_id: str | None) -> None:
        self._dir = path_within(run.dir, "tensorboard")
        # Objects cannot be appended to: files are written locally and uploaded in full.
        self._local_dir = self._dir if is_local(self._dir) else Path(tempfile.mkdtemp(prefix="cdpo-tensorboard-"))
        self._files: dict[str, EventsWriter] = {}

    def begin(self, step: str, index: int) -> None:
        if step in self._files:
            self._files[step].close()
        folder = path_within(self._local_dir, step)
        folder.mkdir(parents=True, exist_ok=True)
        self._files[step] = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        # TensorBoard discards earlier events from `index` on.
        self._write(step, index, session_log=SessionLog(status=SessionLog.START))

    def log(self, metrics: Sequence[Metrics]) -> None:
        for entry in metrics:
            if entry.step not in self._files:
                self.begin(entry.step, entry.index)
            values = [Summary.Value(tag=name, simple_value=value) for name, value in entry.values.items()]
            self._write(entry.step, entry.index, summary=Summary(value=values))
        for step in {entry.step for entry in metrics}:
            self._files[step].flush()
            if self._local_dir != self._dir:
                for path in (self._local_dir / step).iterdir():
                    copy(path, self._dir / step / path.name)

    def close(self, state: str) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, step: str, index: int, **what: Any) -> None:
        self._files[step].write_event(Event(wall_time=time.time(), step=index, **what))

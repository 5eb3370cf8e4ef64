"""Points -> event files in ``<run>/tensorboard``, a folder a step."""

from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX import SummaryWriter

from cdpo_ray.progress.trackers import Point, TrackedRun


class TensorBoard:
    """A writer a step, so that what a restart tells again is purged from that step alone."""

    run_id = None

    def __init__(self, run: TrackedRun, options: Mapping[str, Any], run_id: str | None) -> None:
        self._dir = run.dir / "tensorboard"
        self._writers: dict[str, SummaryWriter] = {}

    def begin(self, place: str, at: int) -> None:
        if place in self._writers:
            self._writers[place].close()
        self._writers[place] = SummaryWriter(str(self._dir / place), purge_step=at)

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.place not in self._writers:
                self.begin(point.place, point.at)
            for name, value in point.values.items():
                self._writers[point.place].add_scalar(name, value, point.at)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

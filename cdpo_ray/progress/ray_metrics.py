"""Points -> gauges that Ray exports for Prometheus, as ``ray_cdpo_generate_images_per_second``.

Ray exports by itself what a run need not: `ray_node_gpus_utilization` (how busy each GPU is), and the queues of every
Ray Data operator, `ray_data_*`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.metrics import Gauge

from cdpo_ray.progress.trackers import Metrics, TrackedRun


class RayMetrics:
    run_id = None

    def __init__(self, run: TrackedRun, options: Mapping[str, Any], run_id: str | None) -> None:
        self._run = run.name
        self._gauges: dict[str, Gauge] = {}

    def begin(self, place: str, at: int) -> None:
        """Gauges have no history."""

    def log(self, points: Sequence[Metrics]) -> None:
        if not ray.is_initialized():
            return
        for point in points:
            for name, value in point.values.items():
                verb = point.place.rpartition("/")[2]
                name = re.sub(r"\W", "_", f"cdpo_{verb}_{name}")
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, description=f"{verb} of cdpo", tag_keys=("run",))
                self._gauges[name].set(value, {"run": self._run})

    def close(self, state: str) -> None: ...

"""Metrics -> gauges that Ray exports for Prometheus, such as ``ray_cdpo_generate_images_per_second``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.metrics import Gauge

from cdpo_ray.progress.trackers import Images, Metrics, TrackedRun


class RayMetrics:
    """Gauges of a run's latest metrics.

    Ray itself exports the utilization of each GPU (`ray_node_gpus_utilization`) and the queues of every Ray Data
    operator (`ray_data_*`).
    """

    run_id = None

    def __init__(self, run: TrackedRun, options: Mapping[str, Any], run_id: str | None) -> None:
        self._run = run.name
        self._gauges: dict[str, Gauge] = {}

    def begin(self, step: str, index: int) -> None:
        """Nothing to do: gauges have no history."""

    def log(self, metrics: Sequence[Metrics]) -> None:
        if not ray.is_initialized():
            return
        for entry in metrics:
            for name, value in entry.values.items():
                verb = entry.step.rpartition("/")[2]
                name = re.sub(r"\W", "_", f"cdpo_{verb}_{name}")
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, description=f"{verb} of cdpo", tag_keys=("run",))
                self._gauges[name].set(value, {"run": self._run})

    def log_images(self, images: Images) -> None:
        """Nothing to do: gauges are numbers."""

    def log_page(self, name: str, page: bytes) -> None:
        """Nothing to do: gauges are numbers."""

    def close(self, state: str) -> None: ...

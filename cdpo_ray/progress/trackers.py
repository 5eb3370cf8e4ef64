"""Metrics, images and reports -> experiment trackers; one module per tracker, registered in `TRACKERS`."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from cdpo_ray.errors import ConfigError
from cdpo_ray.store import output_path

log = logging.getLogger(__name__)
TRACKERS = {
    "tensorboard": "cdpo_ray.progress.tensorboard:TensorBoard",
    "ray": "cdpo_ray.progress.ray_metrics:RayMetrics",
    "wandb": "cdpo_ray.progress.weights_and_biases:WeightsAndBiases",
    "mlflow": "cdpo_ray.progress.mlflow:MLflow",
}
"""Name -> class, imported on first use and called with a `TrackedRun`, its options and its earlier `run_id`."""
ALWAYS = ("tensorboard", "ray")


@dataclass(frozen=True)
class TrackedRun:
    """Description of a run for its trackers.

    Attributes:
        dir: folder of the run.
        settings: the whole configuration as plain values; it holds no secrets.
    """

    name: str
    dir: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """Metrics of a step at one index.

    Attributes:
        step: the step's verb, prefixed by its round if there are several: `train`, `round-2/train`.
        index: update, or number of finished units.
        values: metrics by name.
    """

    step: str
    index: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Images:
    """Images of a step at one index, one per prompt.

    Attributes:
        step, index: see `Metrics`; index 0: before the first update.
        pngs: content of a PNG by prompt.
    """

    step: str
    index: int
    pngs: Mapping[str, bytes]


class Tracker(Protocol):
    """Interface of a tracker; it is disabled when it raises any exception."""

    run_id: str | None
    """Id by which a later process resumes the tracker's run."""

    def begin(self, step: str, index: int) -> None:
        """Metrics of ``step`` follow from ``index`` on; existing ones from there on are repeated."""

    def log(self, metrics: Sequence[Metrics]) -> None:
        """Store metrics durably: a kill after the return must not lose any."""

    def log_images(self, images: Images) -> None:
        """Store images durably."""

    def log_page(self, name: str, page: bytes) -> None:
        """Store a page.

        Args:
            name: path of the page within the run, such as `report.html`.
            page: content of a self-contained HTML page.
        """

    def close(self, state: str) -> None:
        """End the run.

        Args:
            state: `ended`, `failed` or `stopped` (by a signal).
        """


class Trackers:
    """All trackers of a run, called in order by one background thread, so that a slow network does not delay the run.

    Args:
        options: options of the trackers that are used besides `ALWAYS`, by name.
        run_ids: ids of the trackers' runs in an earlier process, by name.

    Raises:
        ConfigError: a package or a setting that a tracker needs is missing.
        StoreError: this process is a Ray job, whose end would delete a tracker's files.
    """

    def __init__(
        self, run: TrackedRun, options: Mapping[str, Mapping[str, Any]], run_ids: Mapping[str, str] | None = None
    ) -> None:
        _refuse_missing(options)
        _refuse_lost(options)
        self.run_ids = dict(run_ids or {})
        self._run = run
        self._options: dict[str, Mapping[str, Any]] = {name: {} for name in ALWAYS} | dict(options)
        self._open: dict[str, Tracker] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trackers")

    def begin(self, step: str, index: int) -> None:
        self._thread.submit(self._each, lambda tracker: tracker.begin(step, index))

    def log(self, entries: Sequence[Metrics | Images], then: Callable[[], None]) -> None:
        """Send metrics and images to all trackers, then call ``then``."""
        metrics = [entry for entry in entries if isinstance(entry, Metrics)]
        images = [entry for entry in entries if isinstance(entry, Images)]

        def send(tracker: Tracker) -> None:
            tracker.log(metrics)
            for entry in images:
                tracker.log_images(entry)

        self._thread.submit(self._each, send).add_done_callback(lambda _: then())

    def log_page(self, name: str, page: bytes) -> None:
        self._thread.submit(self._each, lambda tracker: tracker.log_page(name, page))

    def close(self, state: str) -> None:
        """Wait until everything is sent, and close the trackers.

        Args:
            state: see `Tracker.close`.
        """
        self._thread.submit(self._close, state)
        self._thread.shutdown()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        if self._open is None:
            self._open = dict(self._opened())
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._open[name]
                _warn(name, error)

    def _close(self, state: str) -> None:
        if self._open is not None:
            self._each(lambda tracker: tracker.close(state))

    def _opened(self) -> Iterable[tuple[str, Tracker]]:
        for name, options in self._options.items():
            module, _, kind = TRACKERS[name].partition(":")
            try:
                tracker = getattr(importlib.import_module(module), kind)(self._run, options, self.run_ids.get(name))
            except Exception as error:
                _warn(name, error)
                continue
            if tracker.run_id:
                self.run_ids[name] = tracker.run_id
            yield name, tracker


def _warn(name: str, error: Exception) -> None:
    lines = str(error).splitlines() or [""]
    log.warning("tracking: `%s` is disabled, the run continues: %s: %s", name, type(error).__name__, lines[0])


def _refuse_missing(options: Mapping[str, Mapping[str, Any]]) -> None:
    for name in options:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f'`tracking.{name}`: is not installed; pip install "cdpo_ray[{name}]"')
    if options.get("wandb", {}).get("mode") == "online" and not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(
            "`tracking.wandb`: WANDB_API_KEY is not set in the environment; set it, or `tracking.wandb.mode` to offline"
        )


def _refuse_lost(options: Mapping[str, Mapping[str, Any]]) -> None:
    uri = urlsplit(options.get("mlflow", {}).get("tracking_uri", ""))
    if uri.scheme in ("", "file", "sqlite") and uri.path:
        output_path(uri.path.removeprefix("/") if uri.scheme == "sqlite" else uri.path, "tracking.mlflow.tracking_uri")

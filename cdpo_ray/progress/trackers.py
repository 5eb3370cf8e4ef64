"""Values -> all that keep or draw them; a file a tracker, a line each in `TRACKERS`."""

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
"""Name -> class, imported when used: called with a `TrackedRun`, its options, and what `run_id` it had before."""
ALWAYS = ("tensorboard", "ray")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run.

    Attributes:
        settings: the whole configuration, as plain values; it holds no secrets.
    """

    name: str
    dir: Path
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """Values of one moment of a step.

    Attributes:
        place: the step's verb, within its round if there are several: `train`, `round-2/train`.
        at: update, or units done.
    """

    place: str
    at: int
    values: Mapping[str, float]


class Tracker(Protocol):
    """What a tracker must do; it may raise whatever it likes, and is told no more then."""

    run_id: str | None
    """What a later process goes on with."""

    def begin(self, place: str, at: int) -> None:
        """Points of `place` come from `at` on; any that are there already will be told again."""

    def log(self, points: Sequence[Metrics]) -> None:
        """Keep them; a kill after the return loses none."""

    def close(self, state: str) -> None:
        """The run is over.

        Args:
            state: `ended`, `failed` or `stopped` (by a signal).
        """


class Trackers:
    """All trackers of a run, served in order by one thread: a network that is down holds up nothing.

    Args:
        options: of trackers that are not `ALWAYS` there, by name.
        run_ids: what the trackers of an earlier process had.

    Raises:
        ConfigError: what a tracker needs is not installed or not given.
        StoreError: what a tracker keeps would be lost with the Ray job that this process is.
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

    def begin(self, place: str, at: int) -> None:
        self._thread.submit(self._each, lambda tracker: tracker.begin(place, at))

    def log(self, points: Sequence[Metrics], then: Callable[[], None]) -> None:
        """Tell all trackers, and do something when they were told."""
        self._thread.submit(self._each, lambda tracker: tracker.log(points)).add_done_callback(lambda _: then())

    def close(self, state: str) -> None:
        """Wait until all is told.

        Args:
            state: how the run ended, see `Tracker.close`.
        """
        self._thread.submit(self._close, state)
        self._thread.shutdown()

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        if self._open is None:
            self._open = dict(self._opened())
        for name, tracker in list(self._open.items()):
            try:
                tell(tracker)
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
    log.warning("tracking: `%s` is told no more, the run goes on: %s: %s", name, type(error).__name__, lines[0])


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

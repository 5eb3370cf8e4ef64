"""Points -> a run of MLflow on its tracking server."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # our output holds results alone

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from cdpo_ray.progress.trackers import Metrics, TrackedRun
from cdpo_ray.store import flat

MAX_BATCH = 100  # params a call; the API's limit
MAX_METRICS = 1000
MAX_PARAM_LENGTH = 6000
STATUSES = {"ended": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

# A server that is away for a minute is waited for; the defaults would hold up the end of a run for many.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
logging.getLogger("mlflow").setLevel(logging.ERROR)  # what goes wrong it also raises


class MLflow:
    """One run, which a restart goes on with.

    Args:
        options: `tracking_uri`, `experiment`. Credentials are in the environment, where MLflow reads them.
    """

    def __init__(self, run: TrackedRun, options: Mapping[str, Any], run_id: str | None) -> None:
        self._client = MlflowClient(tracking_uri=options["tracking_uri"])
        if run_id:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(options["experiment"])
        experiment_id = found.experiment_id if found else self._client.create_experiment(options["experiment"])
        self.run_id = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        params = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in flat(run.settings).items()]
        for start in range(0, len(params), MAX_BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + MAX_BATCH])

    def begin(self, place: str, at: int) -> None:
        """MLflow keeps all it was told."""

    def log(self, points: Sequence[Metrics]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(f"{point.place}/{name}", value, now, point.at)
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + MAX_METRICS])

    def close(self, state: str) -> None:
        self._client.set_terminated(self.run_id, status=STATUSES[state])

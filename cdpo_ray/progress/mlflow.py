"""Metrics, images and reports -> a run of MLflow on its tracking server."""

import io
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results only

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from PIL import Image

from cdpo_ray.progress.trackers import Images, Metrics, TrackedRun
from cdpo_ray.store import flat

MAX_BATCH = 100  # params per call; the API's limit
MAX_METRICS = 1000
MAX_PARAM_LENGTH = 6000
STATUSES = {"ended": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

# Wait about a minute for an unreachable server; the defaults would delay the end of a run by many minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
logging.getLogger("mlflow").setLevel(logging.ERROR)  # MLflow also raises its warnings' causes


class MLflow:
    """One MLflow run, which a restart resumes.

    Args:
        options: `tracking_uri` and `experiment`. MLflow reads credentials from the environment.
        run_id: id of the MLflow run to resume, if any.
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

    def begin(self, step: str, index: int) -> None:
        """Nothing to do: MLflow keeps repeated values."""

    def log(self, metrics: Sequence[Metrics]) -> None:
        now = int(time.time() * 1000)
        batch = [
            Metric(f"{entry.step}/{name}", value, now, entry.index)
            for entry in metrics
            for name, value in entry.values.items()
        ]
        for start in range(0, len(batch), MAX_METRICS):
            self._client.log_batch(self.run_id, metrics=batch[start : start + MAX_METRICS])

    def log_images(self, images: Images) -> None:
        """The artifact `prompts.txt` names the prompt of each image: MLflow shows no captions."""
        folder = f"{images.step}/previews"
        self._client.log_text(self.run_id, "\n".join(images.pngs), f"{folder}/prompts.txt")
        for number, png in enumerate(images.pngs.values(), start=1):
            image, key = Image.open(io.BytesIO(png)), f"{images.step}/preview/{number}"
            self._client.log_image(self.run_id, image, key=key, step=images.index, synchronous=True)

    def log_page(self, name: str, page: bytes) -> None:
        self._client.log_text(self.run_id, page.decode(), name)

    def close(self, state: str) -> None:
        self._client.set_terminated(self.run_id, status=STATUSES[state])

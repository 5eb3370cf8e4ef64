"""Metrics, images and the configuration -> event files in ``<run>/tensorboard``, one folder per step."""

import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.api_pb2 import Experiment, MetricInfo, MetricName, Status
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.summary import hparams, text

from cdpo_ray.progress.trackers import Images, Metrics, TrackedRun
from cdpo_ray.store import copy, flat, is_local, path_within

WHOLE_RUN = ""
"""Folder of what belongs to no step: the configuration, as text and as hyperparameters."""
COMPARED = ("loss", "margin", "implicit_accuracy")
"""Metrics of `train` that TensorBoard's table of hyperparameters shows next to those of `evaluate`."""
STATUSES = {"ended": "STATUS_SUCCESS", "failed": "STATUS_FAILURE", "stopped": "STATUS_FAILURE"}


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
        self._open(WHOLE_RUN)
        config = yaml.safe_dump(dict(run.settings), sort_keys=False, allow_unicode=True)
        for summary in (text("config", textwrap.indent(config, "    ")), *_hyperparameters(run.settings)):
            self._write(WHOLE_RUN, 0, summary=summary)
        self._flush(WHOLE_RUN)

    def begin(self, step: str, index: int) -> None:
        if step in self._files:
            self._files[step].close()
        self._open(step)
        # TensorBoard discards earlier events from `index` on.
        self._write(step, index, session_log=SessionLog(status=SessionLog.START))

    def log(self, metrics: Sequence[Metrics]) -> None:
        for entry in metrics:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in entry.values.items()]
            self._write_of_step(entry, Summary(value=values))
        for step in {entry.step for entry in metrics}:
            self._flush(step)

    def log_images(self, images: Images) -> None:
        values = [
            Summary.Value(
                tag=f"preview/{number}",
                metadata=SummaryMetadata(summary_description=textwrap.indent(prompt, "    ")),
                image=Summary.Image(encoded_image_string=png, colorspace=3),
            )
            for number, (prompt, png) in enumerate(images.pngs.items(), start=1)
        ]
        self._write_of_step(images, Summary(value=values))
        self._flush(images.step)

    def log_page(self, name: str, page: bytes) -> None:
        """Nothing to do: TensorBoard shows no pages."""

    def close(self, state: str) -> None:
        end = SessionEndInfo(status=Status.Value(STATUSES[state]), end_time_secs=time.time())
        self._write(WHOLE_RUN, 0, summary=_of_plugin("session_end_info", HParamsPluginData(session_end_info=end)))
        self._flush(WHOLE_RUN)
        for file in self._files.values():
            file.close()

    def _open(self, step: str) -> None:
        folder = path_within(self._local_dir, step) if step else self._local_dir
        folder.mkdir(parents=True, exist_ok=True)
        self._files[step] = EventsWriter(str(folder / "events"), f".{time.time_ns()}")

    def _write_of_step(self, entry: Metrics | Images, summary: Summary) -> None:
        if entry.step not in self._files:
            self.begin(entry.step, entry.index)
        self._write(entry.step, entry.index, summary=summary)

    def _write(self, step: str, index: int, **what: Any) -> None:
        self._files[step].write_event(Event(wall_time=time.time(), step=index, **what))

    def _flush(self, step: str) -> None:
        self._files[step].flush()
        if self._local_dir != self._dir:
            for path in (self._local_dir / step).iterdir():
                if path.is_file():
                    copy(path, self._dir / step / path.name)


def _hyperparameters(settings: Mapping[str, Any]) -> tuple[Summary, Summary]:
    """Configuration for TensorBoard's table of hyperparameters, and the metrics that it shows beside them."""
    values = {
        key: value if isinstance(value, bool | int | float) else str(value) for key, value in flat(settings).items()
    }
    _, start, _ = hparams(values, {})
    rounds, judges = settings.get("rounds", 1), settings.get("evaluation", {}).get("judges", ())
    of_round = f"round-{rounds}/" if rounds > 1 else ""
    metrics = [("train", name) for name in COMPARED] + [("evaluate", f"{judge}/difference") for judge in judges]
    shown = [MetricInfo(name=MetricName(group=f"{of_round}{step}", tag=tag)) for step, tag in metrics]
    return _of_plugin("experiment", HParamsPluginData(experiment=Experiment(metric_infos=shown))), start


def _of_plugin(name: str, content: HParamsPluginData) -> Summary:
    data = SummaryMetadata.PluginData(plugin_name="hparams", content=content.SerializeToString())
    return Summary(value=[Summary.Value(tag=f"_hparams_/{name}", metadata=SummaryMetadata(plugin_data=data))])

"""Ray Train: one fit walks all stages on every worker."""

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from tqdm import tqdm

from cdpo_ray.errors import TrainingError
from cdpo_ray.store import copy, files_within, remove_folder, write_json, write_text
from cdpo_ray.training.job import RECORDS, TRAINED, TrainingJob

log = logging.getLogger(__name__)


class ProgressBoard:
    """Where the first worker writes how far it is, for the driver to show."""

    def __init__(self) -> None:
        self.num_updates = 0
        self.lines: list[str] = []

    def post(self, num_updates: int, line: str | None = None) -> None:
        self.num_updates = max(num_updates, self.num_updates)
        if line:
            self.lines.append(line)

    def read(self, num_lines_seen: int) -> tuple[int, list[str]]:
        return self.num_updates, self.lines[num_lines_seen:]


def train_adapter(
    job: TrainingJob,
    output_dir: Path,
    *,
    num_updates: int,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    max_restarts: int,
) -> list[dict[str, float]]:
    """Write `4-training`: the LoRA or the whole net, `updates.jsonl`, `stages.json`; returns the means of each stage.

    Started again on the same folder it goes on after the last finished stage.
    """
    board = ray.remote(ProgressBoard).options(num_cpus=0).remote()  # type: ignore[attr-defined]
    resources = {"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "board": board},
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="fit",
            storage_path=str((output_dir / "ray").resolve()),
            failure_config=FailureConfig(max_failures=max_restarts),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    with _shown(board, num_updates):
        result = trainer.fit()
    if result.checkpoint is None:
        raise TrainingError(f"{output_dir}: training ended without a checkpoint: {result.error}")
    with result.checkpoint.as_directory() as folder:
        for name, path in files_within(Path(folder) / TRAINED).items():
            copy(path, output_dir / name)
        records = json.loads((Path(folder) / RECORDS).read_text())
    write_text(output_dir / "updates.jsonl", "".join(f"{json.dumps(record)}\n" for record in records["updates"]))
    write_json(output_dir / "stages.json", records["stages"])
    remove_folder(output_dir / "ray")
    stages: list[dict[str, float]] = records["stages"]
    return stages


def _work(config: Mapping[str, Any]) -> None:
    """Runs in each worker; only there are DeepSpeed and diffusers imported, which takes seconds."""
    from cdpo_ray.training.worker import work

    work(config["job"], config["board"])


@contextlib.contextmanager
def _shown(board: Any, num_updates: int) -> Iterator[None]:
    """A bar and a line a stage while the workers train."""
    done = threading.Event()

    def show() -> None:
        num_lines = 0
        with tqdm(total=num_updates, desc="train", unit="update", disable=not sys.stderr.isatty()) as bar:
            while not done.wait(0.5):
                updates, lines = ray.get(board.read.remote(num_lines))
                num_lines += len(lines)
                for line in lines:
                    log.info(line)
                bar.update(updates - bar.n)
            for line in ray.get(board.read.remote(num_lines))[1]:
                log.info(line)
            bar.update(num_updates - bar.n)

    shower = threading.Thread(target=show, daemon=True)
    shower.start()
    try:
        yield
    finally:
        done.set()
        shower.join()

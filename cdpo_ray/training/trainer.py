"""Ray Train: one fit trains all stages on every worker; the driver polls their board."""

import contextlib
import json
import logging
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cdpo_ray.errors import TrainingError
from cdpo_ray.progress import Progress
from cdpo_ray.records import COMMITS_DIR
from cdpo_ray.store import storage_path, write_json, write_text
from cdpo_ray.training.board import Board, Cursor, News, error_of, silence_of
from cdpo_ray.training.commits import names_of, newest_of, state_of
from cdpo_ray.training.job import TrainingJob

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0  # for a board's answer, which comes at once while Ray is alive


def train_adapter(
    job: TrainingJob,
    *,
    num_updates: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    node_labels: Mapping[str, str],
    progress: Progress,
    on_stage: Callable[[dict[str, Any]], Any] = lambda summary: None,
) -> dict[str, Any]:
    """Write `4-training`: the LoRA or the fine-tuned denoiser, `updates.jsonl`, `stages.json`.

    Called again with the same folder it resumes from the newest intact checkpoint. Ray's own records of a fit are not
    used: each fit is new to Ray.

    Args:
        num_updates: number of updates of all stages.
        node_labels: labels of the nodes that may run workers.
        on_stage: called with the summary of each stage that has ended, once its checkpoint is written; on resume, also
            with those of earlier stages.

    Returns:
        Last `TrainingState`, as a dict.

    Raises:
        TrainingError: training cannot continue, or failed more than ``training.max_restarts`` times.
        KeyboardInterrupt: SIGINT or SIGTERM; the current update is in a checkpoint unless the signal came twice.
    """
    training, output_dir = job.training, storage_path(job.output_dir)
    # A board that Ray restarts is empty: workers post everything needed again.
    board = ray.remote(Board).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    resources = {"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}
    failures: list[Exception] = []
    # Ray's records of the fit, which are not used, are on the driver's node, where its controller is.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as ray_dir:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job, "board": board, "fit": secrets.token_hex(8)},
            torch_config=TorchConfig(timeout_s=training.collective_timeout_seconds),
            scaling_config=ScalingConfig(
                num_workers=training.num_workers,
                use_gpu=gpus_per_worker > 0,
                resources_per_worker=resources,
                label_selector=dict(node_labels),
            ),
            run_config=RunConfig(
                name="fit",
                storage_path=ray_dir,
                failure_config=FailureConfig(max_failures=training.max_restarts),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        fit = threading.Thread(target=_fit, args=(trainer, failures), daemon=True)  # signals go to the main thread
        done = max((int(name.partition("-")[2]) for name in names_of(output_dir / COMMITS_DIR)), default=0)
        pairs_per_update = training.global_batch_size
        progress.begin("train", total=num_updates, unit="update", done=done, makes=(pairs_per_update, "pairs"))
        try:
            with _stopping_at_signals(board) as signals:
                fit.start()
                silent_seconds = training.collective_timeout_seconds / 2
                news = _follow(board, fit, progress, done, signals, silent_seconds=silent_seconds, on_stage=on_stage)
        finally:
            progress.end()
    if news.fault:
        raise error_of(news.fault)
    if failures:
        raise TrainingError(
            f"{output_dir}: training failed more than `training.max_restarts` = {training.max_restarts} times; last"
            f" error: {_last_line(failures[0])}; the same command resumes after update {news.num_kept}"
        )
    newest, _ = newest_of(output_dir / COMMITS_DIR)
    assert newest, "successful training ends with a checkpoint"
    saved = state_of(newest)
    state: dict[str, Any] = saved["state"]
    if signals:  # even after the last update: the steps after this one must not run
        raise KeyboardInterrupt(signals[0])
    if state["stage"] <= job.num_stages and not state["is_stopped"]:
        raise TrainingError(
            f"{output_dir}: training ended early, after update {state['num_updates']}; the same command resumes it"
        )
    write_history(saved, output_dir)
    return state


def write_history(saved: Mapping[str, Any], output_dir: Path) -> None:
    """Write `updates.jsonl` and `stages.json`.

    Args:
        saved: `state_of` the last checkpoint. Checkpoints are not deleted here: until the step's folder is in place,
            they are the only complete state.
    """
    records = saved["state"]["records"]
    write_text(output_dir / "updates.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    write_json(output_dir / "stages.json", saved["summaries"])


def _work(config: Mapping[str, Any]) -> None:
    """Entry point of each worker; imports DeepSpeed and diffusers there alone, because that takes seconds."""
    from cdpo_ray.training.worker import work

    work(config["job"], config["board"], config["fit"])


def _fit(trainer: TorchTrainer, failures: list[Exception]) -> None:
    try:
        trainer.fit()
    except Exception as error:
        failures.append(error)


def _follow(
    board: Any,
    fit: threading.Thread,
    progress: Progress,
    num_done: int,
    signals: Sequence[int],
    *,
    silent_seconds: float,
    on_stage: Callable[[dict[str, Any]], Any],
) -> News:
    """Poll the board and report its news until the fit ends; log warnings about workers without heartbeat.

    Args:
        num_done: number of updates done before this fit.
        signals: signals received so far.

    Returns:
        News of the last poll.

    Raises:
        KeyboardInterrupt: a signal was received, and the board does not answer: the signal ended Ray too.
    """
    cursor = Cursor()
    warned: set[str] = set()
    while True:
        is_last = not fit.is_alive()
        reading = board.read.remote(cursor, silent_seconds=silent_seconds)
        while not ray.wait([reading], timeout=ANSWER_SECONDS)[0]:
            if signals:
                raise KeyboardInterrupt(signals[0])
        news: News = ray.get(reading)
        cursor = news.cursor
        for record in news.records:
            values = {name: value for name, value in record.items() if name != "update"}
            progress.record(values, update=int(record["update"]))
        for line in news.lines:
            progress.log_line(line)
        for summary in news.summaries:
            on_stage(summary)
        silent = {rank: found for rank, found in news.silent.items() if found[0] not in warned}
        for line in silence_of(silent):
            log.warning("training: %s", line)
        warned |= {where for where, _ in silent.values()}
        if news.num_updates:  # 0: no update yet
            progress.advance(news.num_updates - num_done)
            num_done = news.num_updates
        if is_last:
            return news
        fit.join(POLL_SECONDS)


@contextlib.contextmanager
def _stopping_at_signals(board: Any) -> Iterator[list[int]]:
    """First SIGINT or SIGTERM: training stops after the current update, with a checkpoint; second: KeyboardInterrupt.

    Yields:
        Signals received, updated in place.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def on_signal(number: int, frame: Any) -> None:
        if signals:
            raise KeyboardInterrupt(number)
        signals.append(number)
        log.warning("training: stopping at the end of this update; signal again to exit at once")
        board.ask_to_stop.remote()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(error: Exception) -> str:
    """Last line of a worker's error, which names the cause."""
    return str(error).strip().splitlines()[-1]

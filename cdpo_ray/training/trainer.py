"""Ray Train: one fit walks all stages on every worker."""

import contextlib
import json
import logging
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
from cdpo_ray.store import write_json, write_text
from cdpo_ray.training.board import Board, News, fault_of
from cdpo_ray.training.commits import names_of, newest_of, state_of
from cdpo_ray.training.job import TrainingJob

log = logging.getLogger(__name__)
POLL_SECONDS = 0.5
ANSWER_SECONDS = 10.0  # of the board, which answers at once while Ray lives


def train_adapter(
    job: TrainingJob,
    output_dir: Path,
    *,
    num_updates: int,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    max_restarts: int,
    progress: Progress,
    on_stage: Callable[[dict[str, Any]], Any] = lambda summary: None,
) -> dict[str, Any]:
    """Write `4-training`: the LoRA or the whole net, `updates.jsonl`, `stages.json`.

    Started again on the same folder it goes on after the newest whole commit. Ray's own records of a fit are not read:
    each fit is new to it.

    Args:
        on_stage: called with the summary of each stage that has ended and is committed; of a training that goes on,
            with those of before too.

    Returns:
        The last state of training, see `Worker`.

    Raises:
        TrainingError: training cannot go on, or was restarted too often.
        KeyboardInterrupt: it was asked to stop, and is committed; or was asked twice, and is not.
    """
    # A board that is lost begins empty: workers post again all that matters.
    board = ray.remote(Board).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
    resources = {"CPU": cpus_per_worker, **({"GPU": gpus_per_worker} if gpus_per_worker else {})}
    failures: list[Exception] = []
    # Ray's records of the fit, which nobody reads, lie on the driver's node, where its controller is.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as ray_dir:
        trainer = TorchTrainer(
            _work,
            train_loop_config={"job": job, "board": board},
            torch_config=TorchConfig(timeout_s=job.collective_timeout_seconds),
            scaling_config=ScalingConfig(
                num_workers=num_workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="fit",
                storage_path=ray_dir,
                failure_config=FailureConfig(max_failures=max_restarts),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        fit = threading.Thread(target=_fit, args=(trainer, failures), daemon=True)  # the main thread's signals are ours
        done = max((int(name.partition("-")[2]) for name in names_of(output_dir / COMMITS_DIR)), default=0)
        pairs_per_update = job.optimization.global_batch_size
        progress.begin("train", total=num_updates, unit="update", done=done, makes=(pairs_per_update, "pairs"))
        try:
            with _stopping_at_signals(board) as asked:
                fit.start()
                news = _followed(
                    board,
                    fit,
                    progress,
                    done,
                    asked,
                    silent_seconds=job.collective_timeout_seconds / 2,
                    on_stage=on_stage,
                )
        finally:
            progress.end()
    if news.fault:
        raise fault_of(news.fault)
    if failures:
        raise TrainingError(
            f"{output_dir}: training failed more than `training.max_restarts` = {max_restarts} times, at last with"
            f" {_told(failures[0])}; the same command goes on after update {news.num_kept}"
        )
    newest, _ = newest_of(output_dir / COMMITS_DIR)
    assert newest, "training that ends well has committed its last update"
    saved = state_of(newest)
    state: dict[str, Any] = saved["state"]
    if asked:  # even if that was the last update: what comes after is not wanted now
        raise KeyboardInterrupt(asked[0])
    if state["stage"] <= job.num_stages:
        raise TrainingError(
            f"{output_dir}: training ended after update {state['num_updates']}; the same command goes on"
        )
    write_history(saved, output_dir)
    return state


def write_history(saved: Mapping[str, Any], output_dir: Path) -> None:
    """Write `updates.jsonl` and `stages.json`.

    Args:
        saved: `state_of` the last commit. The commits stay: until the step is in place, only they are certain.
    """
    records = saved["state"]["records"]
    write_text(output_dir / "updates.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
    write_json(output_dir / "stages.json", saved["summaries"])


def _work(config: Mapping[str, Any]) -> None:
    """Runs in each worker; only there are DeepSpeed and diffusers imported, which takes seconds."""
    from cdpo_ray.training.worker import work

    work(config["job"], config["board"])


def _fit(trainer: TorchTrainer, failures: list[Exception]) -> None:
    try:
        trainer.fit()
    except Exception as error:
        failures.append(error)


def _followed(
    board: Any,
    fit: threading.Thread,
    progress: Progress,
    num_done: int,
    asked: Sequence[int],
    *,
    silent_seconds: float,
    on_stage: Callable[[dict[str, Any]], Any],
) -> News:
    """Pass on what the workers post, until the fit is over; names each worker that falls silent.

    Args:
        num_done: updates that were done before.
        asked: signals that asked training to stop.

    Raises:
        KeyboardInterrupt: a signal came, and the board no longer answers: the signal ended Ray too.
    """
    num_lines = num_stages = last_record = 0
    named: set[str] = set()
    while True:
        over = not fit.is_alive()
        reading = board.read.remote(
            after_update=last_record,
            num_lines_seen=num_lines,
            num_stages_seen=num_stages,
            silent_seconds=silent_seconds,
        )
        while not ray.wait([reading], timeout=ANSWER_SECONDS)[0]:
            if asked:
                raise KeyboardInterrupt(asked[0])
        news: News = ray.get(reading)
        for record in news.records:
            last_record = int(record["update"])
            progress.record({name: value for name, value in record.items() if name != "update"}, update=last_record)
        for line in news.lines:
            progress.tell(line)
        num_lines = news.num_lines
        for summary in news.summaries:
            num_stages += 1
            on_stage(summary)
        for rank, (where, seconds) in news.silent.items():
            if where not in named:
                log.warning("training: worker %d (%s) has given no sign for %.0f s", rank, where, seconds)
                named.add(where)
        if news.num_updates:  # else none has begun
            progress.advance(news.num_updates - num_done)
            num_done = news.num_updates
        if over:
            return news
        fit.join(POLL_SECONDS)


@contextlib.contextmanager
def _stopping_at_signals(board: Any) -> Iterator[list[int]]:
    """SIGINT or SIGTERM once: training stops at its update's end, committed; twice: KeyboardInterrupt at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt(number)
        asked.append(number)
        log.warning("training: stopping at the end of this update; once more to leave at once")
        board.ask_to_stop.remote()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told(error: Exception) -> str:
    """The last line of what a worker raised, which says what it was."""
    return str(error).strip().splitlines()[-1]

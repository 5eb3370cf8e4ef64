"""Ray Train: one training worker."""

import contextlib
import functools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch

from cdpo_ray.cost.memory import use_checkpointing
from cdpo_ray.curriculum.dataset import read_ranking_scores
from cdpo_ray.curriculum.redrawing import redraw_stage
from cdpo_ray.curriculum.reliability import low_reliability
from cdpo_ray.dataflow.memory import is_out_of_memory, needed_and_free
from cdpo_ray.errors import CdpoError, ModelError, TrainingError
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.policy.implicit_rewards import sample_values
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.randomness.numbers import seed_of
from cdpo_ray.records import COMMITS_DIR, preview_file
from cdpo_ray.store import copy_tree, exists, is_local, storage_errors_within, storage_path, write_json
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import StagePairs
from cdpo_ray.training.board import NodeHeartbeats
from cdpo_ray.training.commits import Commits, state_of, tensors_of
from cdpo_ray.training.engine import limit_waiting, restore_training, save_trained, start_engine, training_tensors
from cdpo_ray.training.health import alarm_sentence
from cdpo_ray.training.job import TrainingJob
from cdpo_ray.training.loop import Callbacks, Feed, TrainingState, summarize, train_stages
from cdpo_ray.training.losses import kappa, preference_loss
from cdpo_ray.training.previews import Previewer
from cdpo_ray.training.validation import Validator
from cdpo_ray.training.weight_copy import WeightCopy, averaging_share

HEARTBEAT_SECONDS = 1.0
BEST = "best"
PAIR_COLUMNS = ("prompt_row", "chosen", "rejected")


def work(job: TrainingJob, board: Any, fit: str) -> None:
    """Train all stages, resuming from the newest checkpoint; post errors that a restart cannot fix to the board.

    Args:
        board: actor handle of the driver's `Board`.
        fit: random name of the fit.
    """
    rank = ray.train.get_context().get_world_rank()
    with _heartbeat(board, fit, rank) as stops:
        if ray.get(board.has_fault.remote()):  # restarted by Ray after that fault
            return
        try:
            Worker(job, board).train(stops)
        except CdpoError as error:
            ray.get(board.post_fault.remote(type(error).__name__, str(error)))
            raise  # a worker that returned would leave the others waiting for it
        except Exception as error:
            if is_out_of_memory(error):
                device = "cuda" if torch.cuda.is_available() else "cpu"
                message = (
                    f"training: {job.model['path']} with {job.training.pairs_per_launch} pairs at once: out of"
                    f" memory: {needed_and_free(error, device)}; lower `training.batch_size_per_worker`, set"
                    " `training.gradient_checkpointing`, or raise `training.zero_stage` and `training.num_workers`"
                )
                ray.get(board.post_fault.remote("TrainingError", message))
            raise


class Worker:
    """Policy, engine, feed and checkpoints of one worker."""

    def __init__(self, job: TrainingJob, board: Any) -> None:
        context = ray.train.get_context()
        self.job, self.board, self.output_dir = job, board, storage_path(job.output_dir)
        self.training = training = job.training
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.validator = Validator(job.validation) if job.validation else None
        keep_vae = self.validator is not None or job.previews is not None
        model = load_model(job.family, **job.model, for_training=True, keep_vae=keep_vae)
        empty = {name: value.cpu() for name, value in model.empty_conditioning.items()}
        self.previewer = self._start_previews(model)
        model.drop_text_encoders()
        policy = make_policy(
            model,
            job.lora,
            num_stages=job.num_stages,
            start_dir=storage_path(job.start_dir) if job.start_dir else None,
            start_from=training.start_from,
            reference=training.reference,
            seed=seed_of(job.seed, "lora"),
        )
        if use_checkpointing(training.gradient_checkpointing, job.plain_peak_bytes, _gpu_bytes(job.gpu_share)):
            model.denoiser.enable_gradient_checkpointing()
        model.denoiser.train()
        self.engine = start_engine(model.denoiser, policy.trainable, training, num_workers=self.num_workers)
        limit_waiting(self.engine, training.collective_timeout_seconds)
        self.policy = replace(policy, net=self.engine)
        self.bank = SampleBank.open(storage_path(job.samples_dir))
        self.feed = Feed(self.bank, model.draw_times, empty, training, job.seed, self.rank, self.num_workers)
        self.commits = Commits(self.output_dir / COMMITS_DIR, keep_last=training.keep_last, device=self.engine.device)
        named = {name: value for name, value in self.engine.module.named_parameters() if value.requires_grad}
        self.average = WeightCopy("average", named) if training.ema_decay else None
        self.healthy = WeightCopy("healthy", named) if training.health.stops else None
        self.summaries: list[dict[str, Any]] = []
        self.posted = (0, 0)  # numbers of records and of summaries
        self.best: dict[str, Any] | None = None
        self.drawn: StagePairs | None = None
        self.description: Any = None
        self.started = time.monotonic()

    def train(self, stops: Callable[[], bool]) -> None:
        """Train all stages, resuming from the newest checkpoint; write the trained weights once they are done.

        Args:
            stops: stop flag.

        Raises:
            TrainingError: too many consecutive updates were not finite, or no checkpoint is intact.
        """
        state = self._resumed()
        training, callbacks = (
            self.training,
            Callbacks(self._pairs_of_stage, stops, self._on_update, self._on_check, self._write_checkpoint),
        )
        try:
            state = train_stages(
                self.engine,
                self.policy,
                self.feed,
                state,
                callbacks,
                num_stages=self.job.num_stages,
                preference_loss=functools.partial(preference_loss, beta=training.beta, **training.loss.arguments),
            )
        except TrainingError as error:
            last = self.commits.newest(lambda line: None)
            raise TrainingError(f"{error}; last good checkpoint: {last or 'none'}") from None
        if self._is_done(state):
            self._write_trained(state, self.output_dir)
            if not self.validator:  # else a trial of a search, and the next one trains on the same samples
                self.bank.delete_cache()

    def _start_previews(self, model: TextToImageModel) -> Previewer | None:
        """Encode the preview prompts and sample the base model, which ``model`` is until the policy is made of it."""
        job = self.job.previews
        if job is None:
            return None
        with self._previewing(stage=0):
            previewer = Previewer(job, model, self.output_dir, worker_rank=self.rank, num_workers=self.num_workers)
            if not all(exists(self.output_dir / preview_file(0, prompt)) for prompt in previewer.prompts):
                previewer.write(model, stage=0)
            return previewer
        return None

    @contextlib.contextmanager
    def _previewing(self, *, stage: int) -> Iterator[None]:
        """Context manager that reports previews that need too much memory: training continues without them."""
        try:
            yield
        except ModelError as error:
            line = f"stage {stage}: no preview images: {error}; `training.preview_prompts` 0 samples none"
            self.board.post_line.remote(line)

    def _resumed(self) -> TrainingState:
        newest = self.commits.newest(self.board.post_line.remote)
        if newest is None:
            return TrainingState()
        saved, tensors = state_of(newest), tensors_of(newest)
        restore_training(self.engine, tensors)
        for copy in self._copies:
            if copy.name in saved["copies"]:
                copy.restore(tensors)
            else:  # the config was changed
                copy.approach(1.0)
        self.summaries, self.best = saved["summaries"], saved["best"]
        self.started -= saved["seconds_in_stage"]
        if saved["drawn"]:
            draws = {name: tensors(f"pairs.{name}").numpy() for name in PAIR_COLUMNS}
            self.drawn, self.description = StagePairs(saved["state"]["stage"], **draws), saved["description"]
        state = TrainingState.of(saved["state"])
        self._post_checkpoint(state, [f"training resumes after update {state.num_updates} ({newest})"])
        return state

    def _pairs_of_stage(self, state: TrainingState) -> StagePairs:
        online = self.job.online
        if online is None:
            return StagePairs.read(storage_path(self.job.stages_dir), state.stage, self.bank)
        if self.drawn is None or not state.cursor:  # else keep the pairs drawn at the stage's start, by that policy
            values = sample_values(
                self.policy,
                self.bank.latents,
                self.bank.conditioning,
                num_prompts=self.bank.latents.shape[0],
                kappa=kappa(self.training.beta),
                num_draws=online.num_draws,
                samples_per_launch=2 * self.training.pairs_per_launch,
                seed=self.job.seed,
                stage=state.stage,
                worker_rank=self.rank,
                num_workers=self.num_workers,
            )
            draws, self.description = redraw_stage(
                read_ranking_scores(storage_path(online.scores_dir), online.rule),
                online.schedule,
                values,
                self.bank.row_of_prompt,
                stage=state.stage,
                num_pairs=online.pairs_per_stage,
                seed=self.job.seed,
            )
            self.drawn = StagePairs(state.stage, *draws)
            warning = low_reliability(state.stage, self.description["margin_reliability"], online.num_draws)
            if warning and self.rank == 0:
                self.board.post_line.remote(warning)
        return self.drawn

    def _on_update(self, state: TrainingState) -> None:
        if self.average and self.training.ema_decay and not state.num_skipped_last:
            num_made = state.num_updates - len(state.skipped)
            self.average.approach(averaging_share(num_made, self.training.ema_decay))
        if self.rank == 0:
            self.board.post_update.remote(state.num_updates)

    def _on_check(self, state: TrainingState) -> None:
        """Keep a healthy LoRA if an alarm would stop training; report an alarm."""
        is_alarm = bool(state.alarms) and state.alarms[-1].update == state.num_updates
        if is_alarm and self.rank == 0:
            sentence = alarm_sentence(state.alarms[-1:], self.training.health)
            self.board.post_line.remote(f"{'training stops' if state.is_stopped else 'warning'}: {sentence}")
        if self.healthy and not is_alarm:
            with self._result(state):
                self.healthy.approach(1.0)

    def _is_done(self, state: TrainingState) -> bool:
        return state.is_stopped or state.stage > self.job.num_stages

    @property
    def _copies(self) -> list[WeightCopy]:
        return [copy for copy in (self.average, self.healthy) if copy]

    def _result(self, state: TrainingState) -> contextlib.AbstractContextManager[None]:
        """Context manager within which the policy has the weights that training would end with."""
        copy = self.healthy if state.is_stopped else self.average
        return copy.applied() if copy else contextlib.nullcontext()

    def _write_checkpoint(self, state: TrainingState) -> None:
        """Write a checkpoint; at the end of a stage, with the stage's summary."""
        if self.training.keep_best:
            self._keep_best(state)
        lines = []
        if state.cursor == 0:
            summary = summarize(state.records, state.stage - 1, self.training.global_batch_size)
            summary["last_update"] = state.num_updates
            if self.description:
                summary["pairs"] = self.description
            summary["seconds"] = round(time.monotonic() - self.started, 2)
            if state.is_stopped:
                summary["is_stopped"] = True
            if self.previewer:
                with self._result(state), self._previewing(stage=summary["stage"]):
                    self.previewer.write(self.policy.model, summary["stage"])
            if self.validator:
                with self._result(state):
                    summary["validation"] = self.validator.measure(
                        self.policy,
                        is_last=self._is_done(state),
                        worker_rank=self.rank,
                        num_workers=self.num_workers,
                    )
            self.summaries.append(summary)
            ray.train.report(summary)
            self.started, self.drawn, self.description = time.monotonic(), None, None
            lines = [_line(summary, self.job.num_stages)]
        self.commits.write(
            state.num_updates,
            {
                "state": asdict(state),
                "summaries": self.summaries,
                "best": self.best,
                "seconds_in_stage": time.monotonic() - self.started,
                "drawn": self.drawn is not None,
                "copies": [copy.name for copy in self._copies],
                "description": self.description,
            },
            self._tensors(),
        )
        self._post_checkpoint(state, lines)

    def _post_checkpoint(self, state: TrainingState, lines: list[str]) -> None:
        """Post what is new since the last checkpoint; everything to a board that Ray has restarted."""
        if self.rank > 0:
            return
        for first in (self.posted, (0, 0)):
            records, summaries = state.records[first[0] :], self.summaries[first[1] :]
            if ray.get(self.board.post_checkpoint.remote(state.num_updates, records, summaries, lines, first=first)):
                break
        self.posted = len(state.records), len(self.summaries)

    def _keep_best(self, state: TrainingState) -> None:
        """Write the trained weights to `best` if their loss is the lowest of the stage; a later stage always wins."""
        since = self.best["known_until"] if self.best else 0
        recent = [record for record in state.records if record["update"] > since]
        if not recent:
            return
        stage, loss = recent[-1]["stage"], sum(record["loss"] for record in recent) / len(recent)
        if self.best is None or (stage, -loss) > (self.best["stage"], -self.best["loss"]):
            self.best = {"update": state.num_updates, "stage": stage, "loss": loss}
            self._write_trained(state, self.output_dir / BEST)
            if self.rank == 0:
                write_json(self.output_dir / BEST / "best.json", self.best)
        self.best["known_until"] = state.num_updates

    def _write_trained(self, state: TrainingState, output_dir: Path) -> None:
        with self._result(state), storage_errors_within(output_dir), tempfile.TemporaryDirectory() as local:
            folder = output_dir if is_local(output_dir) else Path(local)
            save_trained(self.engine, self.policy.model, folder, lora=self.job.lora is not None)
            if folder != output_dir:
                copy_tree(folder, output_dir)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from training_tensors(self.engine)
        for copy in self._copies:
            yield from copy.tensors()
        if self.drawn is not None:
            for name in PAIR_COLUMNS:
                yield f"pairs.{name}", torch.from_numpy(np.ascontiguousarray(getattr(self.drawn, name)))


@contextlib.contextmanager
def _heartbeat(board: Any, fit: str, worker_rank: int) -> Iterator[Callable[[], bool]]:
    """Give a heartbeat every second while the block runs; one worker of each node sends them to the board.

    Yields:
        Function that returns the stop flag.
    """
    folder = Path(tempfile.gettempdir()) / f"cdpo_ray-{fit}-{ray.get_runtime_context().get_node_id()}"
    node = NodeHeartbeats(folder, worker_rank, lambda ages: ray.get(board.heartbeats_of.remote(ages)))
    done, stopping = threading.Event(), threading.Event()

    def beat() -> None:
        while not done.is_set():
            if node.beat():
                stopping.set()
            done.wait(HEARTBEAT_SECONDS)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield stopping.is_set
    finally:
        done.set()
        thread.join()
        node.leave()
        ray.get(board.leave.remote(worker_rank))


def _gpu_bytes(share: float) -> float | None:
    """Memory of this worker's share of its GPU; ``None``: no GPU."""
    return share * torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _line(summary: Mapping[str, Any], num_stages: int) -> str:
    reliability = summary.get("pairs", {}).get("margin_reliability")
    order = "" if reliability is None else f", reliability of the order by margin {reliability:.2f}"
    return (
        f"stage {summary['stage']}/{num_stages}: {summary['num_updates']} updates in {summary['seconds']:.0f} s,"
        f" loss {summary['loss']:.4f}, margin {summary['margin']:+.3f},"
        f" implicit accuracy {summary['implicit_accuracy']:.2f}{order}"
    )

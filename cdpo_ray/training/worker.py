"""Ray Train: what one training worker does."""

import functools
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train

from cdpo_ray.models import load_model
from cdpo_ray.models.seeds import seed_of
from cdpo_ray.store import write_json
from cdpo_ray.training.batches import SampleBank, StagePairs
from cdpo_ray.training.engine import load_training, save_trained, save_training, start_engine
from cdpo_ray.training.job import RECORDS, TRAINED, TrainingJob
from cdpo_ray.training.loop import Feed, TrainingState, summarize, train_stages
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.policy import make_policy


def work(job: TrainingJob, board: Any) -> None:
    """Set up, take up an earlier checkpoint, train all stages, report each.

    Args:
        board: actor handle of the `ProgressBoard` that the driver shows.
    """
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    model = load_model(job.family, **job.model, for_training=True)
    model.guidance_range = job.guidance_range or model.guidance_range
    empty = {name: value.cpu() for name, value in model.empty_conditioning.items()}
    model.drop_text_encoders()
    policy = make_policy(
        model,
        job.lora,
        start_dir=Path(job.start_dir) if job.start_dir else None,
        reference_is_start=job.reference_is_start,
        seed=seed_of(job.seed, "lora"),
    )
    if job.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    engine = start_engine(model.denoiser, policy.trainable, job.optimization, num_workers=num_workers)
    bank = SampleBank.read(Path(job.samples_dir))
    feed = Feed(bank, model.draw_times, empty, job.empty_prompt_fraction, job.seed, rank, num_workers, job.optimization)
    state, summaries = TrainingState(), []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = load_training(engine, Path(folder))
            state, summaries = TrainingState(**saved["state"]), saved["summaries"]
    started = time.monotonic()

    def on_update(num_updates: int) -> None:
        if rank == 0:
            board.post.remote(num_updates)

    def on_stage(state: TrainingState) -> None:
        nonlocal started
        summary = summarize(state.records, state.stage - 1, job.optimization.global_batch_size)
        summary["seconds"] = round(time.monotonic() - started, 2)
        summaries.append(summary)
        with tempfile.TemporaryDirectory() as folder:
            save_training(engine, Path(folder), {"state": asdict(state), "summaries": summaries})
            save_trained(engine, model, Path(folder) / TRAINED, lora=job.lora is not None)
            if rank == 0:
                write_json(Path(folder) / RECORDS, {"updates": state.records, "stages": summaries})
                board.post.remote(len(state.records), _line(summary, job.num_stages))
            ray.train.report(summary, checkpoint=ray.train.Checkpoint.from_directory(folder))
        started = time.monotonic()

    train_stages(
        engine,
        model,
        policy.reference,
        job.num_stages,
        lambda stage: StagePairs.read(Path(job.stages_dir), stage, bank),
        feed,
        state,
        preference_loss=functools.partial(preference_loss, **asdict(job.loss)),
        on_update=on_update,
        on_stage=on_stage,
    )


def _line(summary: Mapping[str, float], num_stages: int) -> str:
    return (
        f"stage {summary['stage']}/{num_stages}: {summary['num_updates']} updates in {summary['seconds']:.0f} s,"
        f" loss {summary['loss']:.4f}, margin {summary['margin']:+.3f},"
        f" implicit accuracy {summary['implicit_accuracy']:.2f}"
    )

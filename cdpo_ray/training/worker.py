"""Ray Train: what one training worker does."""

import functools
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
from numpy.typing import NDArray

from cdpo_ray.curriculum.dataset import read_ranking_scores
from cdpo_ray.curriculum.explanation import describe_stage
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Curriculum
from cdpo_ray.models import load_model
from cdpo_ray.models.seeds import seed_of
from cdpo_ray.store import place, write_json
from cdpo_ray.training.batches import SampleBank, StagePairs
from cdpo_ray.training.engine import load_training, save_trained, save_training, start_engine
from cdpo_ray.training.job import RECORDS, TRAINED, OnlineJob, TrainingJob
from cdpo_ray.training.loop import Feed, TrainingState, summarize, train_stages
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.margins import sample_values
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
        start_dir=place(job.start_dir) if job.start_dir else None,
        reference_is_start=job.reference_is_start,
        seed=seed_of(job.seed, "lora"),
    )
    if job.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    model.denoiser.train()
    engine = start_engine(model.denoiser, policy.trainable, job.optimization, num_workers=num_workers)
    bank = SampleBank.read(place(job.samples_dir))
    feed = Feed(bank, model.draw_times, empty, job.empty_prompt_fraction, job.seed, rank, num_workers, job.optimization)
    state, summaries = TrainingState(), []
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = load_training(engine, Path(folder))
            state, summaries = TrainingState(**saved["state"]), saved["summaries"]
    started = time.monotonic()
    descriptions: dict[int, Any] = {}

    def begin_stage(stage: int) -> StagePairs:
        policy.begin_stage(stage)
        if job.online is None:
            return StagePairs.read(place(job.stages_dir), stage, bank)
        values = sample_values(
            model,
            engine,
            policy.reference,
            engine.module,
            bank,
            beta=job.loss.beta,
            num_draws=job.online.num_draws,
            samples_per_launch=2 * job.optimization.pairs_per_launch,
            seed=job.seed,
            stage=stage,
            worker_rank=rank,
            num_workers=num_workers,
        )
        pairs, descriptions[stage] = redrawn(job.online, bank, values, stage=stage, seed=job.seed)
        return pairs

    def on_update(num_updates: int) -> None:
        if rank == 0:
            board.post.remote(num_updates)

    def on_stage(state: TrainingState) -> None:
        nonlocal started
        summary: dict[str, Any] = summarize(state.records, state.stage - 1, job.optimization.global_batch_size)
        if described := descriptions.get(state.stage - 1):
            summary["pairs"] = described
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
        begin_stage,
        feed,
        state,
        preference_loss=functools.partial(preference_loss, **asdict(job.loss)),
        on_update=on_update,
        on_stage=on_stage,
    )


def redrawn(
    online: OnlineJob, bank: SampleBank, values: NDArray[np.float32], *, stage: int, seed: int
) -> tuple[StagePairs, dict[str, Any]]:
    """What a stage trains on once the policy's margins are known, and what it holds; every worker finds the same.

    Args:
        values: ``[prompt, sample]`` by row of the bank.
    """
    table = read_ranking_scores(place(online.scores_dir), online.rule)
    rows = bank.row_of_prompt[table.prompt_index]
    ranking = rank_samples(table.scores)
    curriculum = Curriculum(ranking, online.schedule, seed=seed, values=values[rows], gap_noise=table.gap_noise)
    pairs, admitted = curriculum.plan(stage, online.pairs_per_stage)
    largest = curriculum.formed.extent.max_score_gap
    described = describe_stage(
        stage,
        online.schedule.levels(stage),
        admitted,
        pairs,
        largest_score_gap=largest,
        gap_noise=table.gap_noise,
    )
    return StagePairs(stage, rows[pairs.prompt], pairs.chosen, pairs.rejected), described


def _line(summary: Mapping[str, float], num_stages: int) -> str:
    return (
        f"stage {summary['stage']}/{num_stages}: {summary['num_updates']} updates in {summary['seconds']:.0f} s,"
        f" loss {summary['loss']:.4f}, margin {summary['margin']:+.3f},"
        f" implicit accuracy {summary['implicit_accuracy']:.2f}"
    )

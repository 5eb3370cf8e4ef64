"""Stages -> updates: the staged training loop of one worker."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
from torch import Tensor

from cdpo_ray.errors import TrainingError
from cdpo_ray.models.family import Conditioning, TextToImageModel, Times
from cdpo_ray.training.batches import PairBatch, SampleBank, StagePairs, make_batch, prefetched
from cdpo_ray.training.job import Optimization
from cdpo_ray.training.policy import Reference
from cdpo_ray.training.update import METRICS, PreferenceLoss, loss_of_pairs

UpdateRecord = dict[str, float]


@dataclass(frozen=True)
class TrainingState:
    """All the progress there is: the stage to train next, 1-based, and what was recorded so far."""

    stage: int = 1
    records: list[UpdateRecord] = field(default_factory=list)

    def after_stage(self, records: list[UpdateRecord]) -> "TrainingState":
        return replace(self, stage=self.stage + 1, records=[*self.records, *records])


@dataclass(frozen=True)
class Feed:
    """What a worker trains on: its share of each global batch, cut into launches.

    Which pairs are in update ``u`` of a stage does not depend on the number of workers.
    """

    bank: SampleBank
    draw_times: Callable[[torch.Generator], Times]
    empty_conditioning: Conditioning
    empty_prompt_fraction: float
    seed: int
    worker_rank: int
    num_workers: int
    optimization: Optimization

    def launches(self, pairs: StagePairs) -> Iterator[PairBatch]:
        """Batches of ``pairs_per_launch`` pairs, update after update."""
        size = self.optimization.pairs_per_launch
        share = self.optimization.global_batch_size // self.num_workers
        for start in range(0, len(pairs.chosen), self.optimization.global_batch_size):
            first = start + self.worker_rank * share
            for draw in range(first, first + share, size):
                yield make_batch(
                    self.bank,
                    pairs,
                    range(draw, draw + size),
                    seed=self.seed,
                    draw_times=self.draw_times,
                    empty_prompt_fraction=self.empty_prompt_fraction,
                    empty_conditioning=self.empty_conditioning,
                )


def train_stages(
    engine: deepspeed.DeepSpeedEngine,
    model: TextToImageModel,
    reference: Reference,
    num_stages: int,
    begin_stage: Callable[[int], StagePairs],
    feed: Feed,
    state: TrainingState,
    *,
    preference_loss: PreferenceLoss,
    on_update: Callable[[int], Any],
    on_stage: Callable[[TrainingState], Any],
) -> TrainingState:
    """Train stage after stage, easy to hard, from where ``state`` stands.

    Args:
        begin_stage: called with a stage, 1-based, before its first update; gives what it trains on.
        on_update: called with the number of updates done in all, once an update.
        on_stage: called with the new state after each stage.

    Raises:
        TrainingError: a loss was not finite.
    """
    per_update = engine.gradient_accumulation_steps()
    for stage in range(state.stage, num_stages + 1):
        pairs = begin_stage(stage)
        metrics: list[Tensor] = []
        for number, batch in enumerate(prefetched(feed.launches(pairs)), start=1):
            batch = batch.to(model.device, model.dtype)
            loss, launch_metrics = loss_of_pairs(
                model, engine, reference, engine.module, batch, preference_loss=preference_loss
            )
            engine.backward(loss)
            engine.step()
            metrics.append(launch_metrics)
            if number % per_update == 0:
                on_update(len(state.records) + number // per_update)
        state = state.after_stage(_records(stage, metrics, per_update, first=len(state.records) + 1))
        on_stage(state)
    return state


def summarize(records: Sequence[UpdateRecord], stage: int, pairs_per_update: int) -> dict[str, Any]:
    """Means of a stage's updates."""
    mine = [record for record in records if record["stage"] == stage]
    means = {name: sum(record[name] for record in mine) / len(mine) for name in METRICS}
    return {"stage": stage, "num_updates": len(mine), "num_pairs": len(mine) * pairs_per_update, **means}


def _records(stage: int, metrics: list[Tensor], per_update: int, *, first: int) -> list[UpdateRecord]:
    """Means over launches and workers, a record an update; the one place where the loop waits for the GPU."""
    values = torch.stack(metrics).reshape(-1, per_update, len(METRICS)).mean(dim=1)
    torch.distributed.all_reduce(values)
    values /= torch.distributed.get_world_size()
    if not values.isfinite().all():
        bad = first + int((~values.isfinite().all(dim=1)).nonzero()[0])
        raise TrainingError(
            f"training: loss or error of update {bad} (stage {stage}) is not finite; lower `training.learning_rate`"
            " or `training.beta`, or use a wider `model.dtype`"
        )
    return [
        {"update": first + row, "stage": stage, **dict(zip(METRICS, line, strict=True))}
        for row, line in enumerate(values.tolist())
    ]

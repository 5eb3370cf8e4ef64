"""Stages -> updates: the training loop of one worker."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from cdpo_ray.config.training import TrainingSection
from cdpo_ray.errors import TrainingError
from cdpo_ray.models.family import Conditioning, Times
from cdpo_ray.policy.policy import Policy
from cdpo_ray.training.batches import PairBatch, SampleBank, StagePairs, make_batch, prefetched
from cdpo_ray.training.update import METRICS, PreferenceLoss, loss_of_pairs

UpdateRecord = dict[str, float]


@dataclass(frozen=True)
class TrainingState:
    """Training progress, besides weights and optimizer state; random draws are addressed, so there is no RNG state.

    Attributes:
        stage: current or next stage, 1-based.
        cursor: number of updates done in that stage.
        records: one record per update that was not skipped, as far as they have been read from the device.
        skipped: numbers of the updates skipped because a loss or gradient was not finite.
        num_updates: total number of updates, skipped ones included.
    """

    stage: int = 1
    cursor: int = 0
    records: tuple[UpdateRecord, ...] = ()
    skipped: tuple[int, ...] = ()
    num_updates: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """State from the JSON of its `asdict`."""
        return cls(**{**saved, "records": tuple(saved["records"]), "skipped": tuple(saved["skipped"])})

    def after_update(self, *, skipped: bool) -> "TrainingState":
        number = self.num_updates + 1
        skips = (*self.skipped, number) if skipped else self.skipped
        return replace(self, cursor=self.cursor + 1, num_updates=number, skipped=skips)

    def after_stage(self) -> "TrainingState":
        return replace(self, stage=self.stage + 1, cursor=0)

    @property
    def num_skipped_last(self) -> int:
        """Number of consecutive skipped updates, up to the last one."""
        count = 0
        while count < len(self.skipped) and self.skipped[-1 - count] == self.num_updates - count:
            count += 1
        return count


@dataclass(frozen=True)
class Feed:
    """A worker's share of each global batch, split into launches (micro-batches).

    The pairs of update ``u`` of a stage do not depend on the number of workers.

    Attributes:
        draw_times: the model family's.
        empty_conditioning: one row, of the empty prompt.
        seed: address of all draws, with the stage and the draw's number.
    """

    bank: SampleBank
    draw_times: Callable[[torch.Generator], Times]
    empty_conditioning: Conditioning
    training: TrainingSection
    seed: int
    worker_rank: int = 0
    num_workers: int = 1

    def launches(self, pairs: StagePairs, *, after: int = 0) -> Iterator[PairBatch]:
        """Batches of ``pairs_per_launch`` pairs in training order, without those of the first ``after`` updates."""
        size, per_update = self.training.pairs_per_launch, self.training.global_batch_size
        share = per_update // self.num_workers
        for start in range(after * per_update, len(pairs.chosen), per_update):
            first = start + self.worker_rank * share
            for draw in range(first, first + share, size):
                yield make_batch(
                    self.bank,
                    pairs,
                    range(draw, draw + size),
                    seed=self.seed,
                    draw_times=self.draw_times,
                    empty_prompt_fraction=self.training.empty_prompt_fraction,
                    empty_conditioning=self.empty_conditioning,
                )


class Guard:
    """Checks that losses and gradients are finite, with one synchronisation per update.

    Args:
        trainable: parameters whose gradients are checked: by their norm, once per update. Under ZeRO, which takes
            gradients away as soon as they are computed, and in fp16, whose norm overflows, hooks sum them in fp32.
        sharded: whether ZeRO is on.
    """

    def __init__(self, trainable: Sequence[nn.Parameter], device: torch.device, *, sharded: bool) -> None:
        self.total = torch.zeros((), device=device)
        self.whole = []
        for parameter in trainable:
            if sharded or parameter.dtype == torch.float16:
                parameter.register_hook(self.see)
            else:
                self.whole.append(parameter)

    def see(self, value: Tensor) -> None:
        """Add a loss or gradient to the running sum, which is finite only if every term is."""
        self.total += value.detach().sum(dtype=torch.float32)

    def verdict(self, *, stops: bool) -> tuple[bool, bool]:
        """Whether any worker has seen a non-finite value, and whether any has its stop flag set; the same on all.

        The only point of an update that synchronises with the device. Resets the running sum.
        """
        if gradients := [parameter.grad for parameter in self.whole if parameter.grad is not None]:
            self.total += get_total_norm(gradients)
        flags = torch.stack([~self.total.isfinite(), torch.full_like(self.total, stops, dtype=torch.bool)]).float()
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        self.total.zero_()
        is_bad, stopping = flags.bool().tolist()
        return is_bad, stopping


@dataclass(frozen=True)
class Callbacks:
    """Calls of the training loop to its owner.

    Attributes:
        pairs_of_stage: returns the pairs of ``state.stage``; called before a stage's first update and on resume in it.
        stops: stop flag, read once per update; ``True``: stop after this update.
        on_update: called after each update.
        on_checkpoint: called with all records read where a checkpoint is due: every ``updates_per_commit`` updates,
            after each stage, and before stopping.
    """

    pairs_of_stage: Callable[[TrainingState], StagePairs]
    stops: Callable[[], bool] = lambda: False
    on_update: Callable[[TrainingState], Any] = lambda state: None
    on_checkpoint: Callable[[TrainingState], Any] = lambda state: None


def train_stages(
    engine: deepspeed.DeepSpeedEngine,
    policy: Policy,
    feed: Feed,
    state: TrainingState,
    callbacks: Callbacks,
    *,
    num_stages: int,
    preference_loss: PreferenceLoss,
) -> TrainingState:
    """Train stage after stage, starting from ``state``.

    Args:
        engine: engine around the policy's denoiser.
        policy: policy of the same denoiser.

    Returns:
        State after the last update; its ``stage`` is ``num_stages + 1`` once all stages are done.

    Raises:
        TrainingError: ``max_skipped_updates`` consecutive updates, or all updates of a stage, were not finite.
    """
    model, section, policy = policy.model, feed.training, replace(policy, net=engine)
    per_update = engine.gradient_accumulation_steps()
    guard = Guard(
        [parameter for parameter in engine.module.parameters() if parameter.requires_grad],
        engine.device,
        sharded=engine.zero_optimization(),
    )
    unread: list[Tensor] = []
    for _ in range(state.stage, num_stages + 1):
        policy.begin_stage(state.stage)
        pairs = callbacks.pairs_of_stage(state)
        num_updates = len(pairs.chosen) // section.global_batch_size
        for number, batch in enumerate(prefetched(feed.launches(pairs, after=state.cursor)), start=1):
            batch = batch.to(model.device, model.dtype)
            loss, metrics = loss_of_pairs(policy, batch, preference_loss=preference_loss)
            guard.see(loss)
            engine.backward(loss)
            unread.append(metrics)
            if number % per_update:
                engine.step()  # accumulates: the update is not complete
                continue
            skips, stopping = guard.verdict(stops=callbacks.stops())
            engine.basic_optimizer.skips = skips
            engine.step()
            state = state.after_update(skipped=skips)
            callbacks.on_update(state)
            if state.num_skipped_last >= min(section.max_skipped_updates, num_updates):
                raise TrainingError(
                    f"training: loss or gradient not finite in the last {state.num_skipped_last} updates, up to update"
                    f" {state.num_updates} (stage {state.stage}); lower `training.learning_rate` or `training.beta`, or"
                    " use a wider `model.dtype`"
                )
            at_end = state.cursor == num_updates
            if at_end or stopping or state.num_updates % section.updates_per_commit == 0:
                state = _with_records(state, unread, per_update)
                unread.clear()
                state = state.after_stage() if at_end else state
                callbacks.on_checkpoint(state)
            if stopping:
                return state
    return state


def summarize(records: Sequence[UpdateRecord], stage: int, pairs_per_update: int) -> dict[str, Any]:
    """Number of updates and pairs of a stage, and the means of its `METRICS`, without skipped updates."""
    mine = [record for record in records if record["stage"] == stage]
    means = {name: sum(record[name] for record in mine) / len(mine) for name in METRICS}
    return {"stage": stage, "num_updates": len(mine), "num_pairs": len(mine) * pairs_per_update, **means}


def _with_records(state: TrainingState, unread: list[Tensor], per_update: int) -> TrainingState:
    """Append one record per update: metrics averaged over launches and workers.

    Args:
        unread: metrics ``[7]`` of each launch of the last updates, on the device.
        per_update: number of launches per update.
    """
    values = torch.stack(unread).reshape(-1, per_update, len(METRICS)).mean(dim=1)
    torch.distributed.all_reduce(values)
    values /= torch.distributed.get_world_size()
    first = state.num_updates - len(values) + 1
    read = [
        {"update": update, "stage": state.stage, **dict(zip(METRICS, line, strict=True))}
        for update, line in enumerate(values.tolist(), start=first)
        if update not in state.skipped
    ]
    return replace(state, records=(*state.records, *read))

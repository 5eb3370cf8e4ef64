"""Stages -> updates: the staged training loop of one worker."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import deepspeed
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from cdpo_ray.config.training import TrainingSection
from cdpo_ray.errors import TrainingError
from cdpo_ray.models.family import Conditioning, TextToImageModel, Times
from cdpo_ray.policy.policy import Reference
from cdpo_ray.training.batches import PairBatch, SampleBank, StagePairs, make_batch, prefetched
from cdpo_ray.training.update import METRICS, PreferenceLoss, loss_of_pairs

UpdateRecord = dict[str, float]


@dataclass(frozen=True)
class TrainingState:
    """All the progress there is, beside weights and optimizer: nothing random is consumed, so no generator has a state.

    Attributes:
        stage: to train next, or now; 1-based.
        cursor: updates of that stage that are done.
        records: a record an update that was made, as far as they have been read off the device.
        skipped: numbers of the updates that were not made, for a loss or gradient was not finite.
    """

    stage: int = 1
    cursor: int = 0
    records: tuple[UpdateRecord, ...] = ()
    skipped: tuple[int, ...] = ()
    num_updates: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """Out of what `asdict` made, and JSON of it."""
        return cls(**{**saved, "records": tuple(saved["records"]), "skipped": tuple(saved["skipped"])})

    def after_update(self, *, skipped: bool) -> "TrainingState":
        number = self.num_updates + 1
        skips = (*self.skipped, number) if skipped else self.skipped
        return replace(self, cursor=self.cursor + 1, num_updates=number, skipped=skips)

    def after_stage(self) -> "TrainingState":
        return replace(self, stage=self.stage + 1, cursor=0)

    @property
    def num_skipped_last(self) -> int:
        """Updates skipped one after the other up to now."""
        count = 0
        while count < len(self.skipped) and self.skipped[-1 - count] == self.num_updates - count:
            count += 1
        return count


@dataclass(frozen=True)
class Feed:
    """What a worker trains on: its share of each global batch, cut into launches.

    Which pairs are in update ``u`` of a stage does not depend on the number of workers.
    """

    bank: SampleBank
    draw_times: Callable[[torch.Generator], Times]
    empty_conditioning: Conditioning
    training: TrainingSection
    seed: int
    worker_rank: int = 0
    num_workers: int = 1

    def launches(self, pairs: StagePairs, *, after: int = 0) -> Iterator[PairBatch]:
        """Batches of ``pairs_per_launch`` pairs, update after update, after so many updates."""
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
    """Sees whether what was computed since the last verdict is finite, without waiting for the device.

    Args:
        trainable: parameters whose gradients are checked. Their norm is taken once per update. ZeRO moves gradients
            away as they come, and the norm of fp16 gradients overflows, so those are summed by a hook each, in fp32.
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
        """A sum is finite only if all of it is."""
        self.total += value.detach().sum(dtype=torch.float32)

    def verdict(self, *, stops: bool) -> tuple[bool, bool]:
        """Whether any worker saw what is not finite, and whether any is asked to stop; the same on all of them.

        The one place of an update where the loop waits for the device.
        """
        if gradients := [parameter.grad for parameter in self.whole if parameter.grad is not None]:
            self.total += get_total_norm(gradients)
        said = torch.stack([~self.total.isfinite(), torch.full_like(self.total, stops, dtype=torch.bool)]).float()
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
        self.total.zero_()
        is_bad, stopping = said.bool().tolist()
        return is_bad, stopping


def train_stages(
    engine: deepspeed.DeepSpeedEngine,
    model: TextToImageModel,
    reference: Reference,
    num_stages: int,
    begin_stage: Callable[[TrainingState], StagePairs],
    feed: Feed,
    state: TrainingState,
    *,
    preference_loss: PreferenceLoss,
    updates_per_commit: int | None = None,
    max_skipped_updates: int = 20,
    stops: Callable[[], bool] = lambda: False,
    on_update: Callable[[TrainingState], Any] = lambda state: None,
    on_commit: Callable[[TrainingState], Any] = lambda state: None,
) -> TrainingState:
    """Train stage after stage, easy to hard, from where ``state`` stands.

    Args:
        begin_stage: called before the first update of a stage, and where one is taken up; gives what it trains on.
        updates_per_commit: how often ``on_commit`` is called, beside after each stage and where training stops.
        max_skipped_updates: so many updates in a row may not be finite.
        stops: whether to leave after this update.
        on_update: called once an update.
        on_commit: called with all records read; what it keeps, training can be taken up from.

    Raises:
        TrainingError: too many updates in a row were not finite.
    """
    per_update = engine.gradient_accumulation_steps()
    guard = Guard(
        [parameter for parameter in engine.module.parameters() if parameter.requires_grad],
        engine.device,
        sharded=engine.zero_optimization(),
    )
    unread: list[Tensor] = []
    for _ in range(state.stage, num_stages + 1):
        pairs = begin_stage(state)
        num_updates = len(pairs.chosen) // feed.training.global_batch_size
        for number, batch in enumerate(prefetched(feed.launches(pairs, after=state.cursor)), start=1):
            batch = batch.to(model.device, model.dtype)
            loss, metrics = loss_of_pairs(model, engine, reference, batch, preference_loss=preference_loss)
            guard.see(loss)
            engine.backward(loss)
            unread.append(metrics)
            if number % per_update:
                engine.step()  # the update is not complete
                continue
            skips, stopping = guard.verdict(stops=stops())
            engine.basic_optimizer.skips = skips
            engine.step()
            state = state.after_update(skipped=skips)
            on_update(state)
            if state.num_skipped_last >= min(max_skipped_updates, num_updates):
                raise TrainingError(
                    f"training: loss or gradient of the last {state.num_skipped_last} updates, to {state.num_updates}"
                    f" (stage {state.stage}), was not finite; lower `training.learning_rate` or `training.beta`, or use"
                    " a wider `model.dtype`"
                )
            at_end = state.cursor == num_updates
            if at_end or stopping or (updates_per_commit and state.num_updates % updates_per_commit == 0):
                state = _with_records(state, unread, per_update)
                unread.clear()
                state = state.after_stage() if at_end else state
                on_commit(state)
            if stopping:
                return state
    return state


def summarize(records: Sequence[UpdateRecord], stage: int, pairs_per_update: int) -> dict[str, Any]:
    """Means of a stage's updates."""
    mine = [record for record in records if record["stage"] == stage]
    means = {name: sum(record[name] for record in mine) / len(mine) for name in METRICS}
    return {"stage": stage, "num_updates": len(mine), "num_pairs": len(mine) * pairs_per_update, **means}


def _with_records(state: TrainingState, unread: list[Tensor], per_update: int) -> TrainingState:
    """Means over launches and workers, a record an update of the stage."""
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

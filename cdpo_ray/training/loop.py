"""Stages -> updates: the training loop of one worker."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import deepspeed
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parameters_to_vector

from cdpo_ray.config.training import HealthSection, TrainingSection
from cdpo_ray.errors import TrainingError
from cdpo_ray.models.family import Conditioning, Times
from cdpo_ray.policy.policy import Policy
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import PairBatch, StagePairs, announced, make_batch, prefetched
from cdpo_ray.training.health import Alarm, alarm_sentence, error_rise
from cdpo_ray.training.learning_rate import learning_rate_at
from cdpo_ray.training.update import METRICS, PreferenceLoss, loss_of_pairs

UpdateRecord = dict[str, float]
NORMS = ("grad_norm", "update_norm")
"""Norm of an update's gradient before clipping, and of the change of the LoRA (not under ZeRO 3)."""
PAIRS_AHEAD = 128  # whose samples are fetched before their batches are made
MEAN_MARGIN_MOMENTUM = 0.9  # published: arXiv:2407.08639


@dataclass(frozen=True)
class TrainingState:
    """Training progress, besides weights and optimizer state; random draws are addressed, so there is no RNG state.

    Attributes:
        stage: current or next stage, 1-based.
        cursor: number of updates done in that stage.
        records: one record per update that was not skipped, as far as they have been read from the device.
        skipped: numbers of the updates skipped because a loss or gradient was not finite.
        num_updates: total number of updates, skipped ones included.
        mean_margin: running mean of the updates' margins, for ``adaptive_beta``.
        alarms: comparisons that exceeded the bound of ``health``, in order.
        is_stopped: whether an alarm has ended training.
    """

    stage: int = 1
    cursor: int = 0
    records: tuple[UpdateRecord, ...] = ()
    skipped: tuple[int, ...] = ()
    num_updates: int = 0
    mean_margin: float = 0.0
    alarms: tuple[Alarm, ...] = ()
    is_stopped: bool = False

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """State from the JSON of its `asdict`."""
        if missing := {field.name for field in fields(cls)} - {*saved}:
            raise TrainingError(
                f"the checkpoint lacks {', '.join(sorted(missing))}: another version wrote it; resume with that"
                " version, or delete the folder to restart training"
            )
        alarms = tuple(Alarm(**alarm) for alarm in saved["alarms"])
        lists = {name: tuple(saved[name]) for name in ("records", "skipped")}
        return cls(**{**saved, **lists, "alarms": alarms})

    def after_update(self, *, skipped: bool) -> "TrainingState":
        number = self.num_updates + 1
        skips = (*self.skipped, number) if skipped else self.skipped
        return replace(self, cursor=self.cursor + 1, num_updates=number, skipped=skips)

    def after_stage(self) -> "TrainingState":
        return replace(self, stage=self.stage + 1, cursor=0)

    def after_check(self, health: HealthSection) -> "TrainingState":
        """State after comparing the last updates' errors with the bound of the alarm.

        Raises:
            TrainingError: an alarm stops training at its first comparison, before any LoRA was found healthy.
        """
        rise = error_rise(self.records, last=self.num_updates, window=health.window)
        if rise is None or health.max_error_rise is None or rise <= health.max_error_rise:
            return self
        if health.stops and self.records[-1]["stage"] < self.stage:  # a stage without a record cannot end
            return self
        state = replace(self, alarms=(*self.alarms, Alarm(self.num_updates, rise)), is_stopped=health.stops)
        if health.stops and not health.check_before(self.num_updates):
            raise TrainingError(
                f"training: {alarm_sentence(state.alarms, health)}; this was the first comparison, so there is no"
                " earlier LoRA to keep"
            )
        return state

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
        first = self.worker_rank * share
        own = np.arange(after * per_update, len(pairs.chosen)).reshape(-1, per_update)[:, first : first + share]
        self.bank.expect(pairs.prompt_row[own.ravel()])
        launches = (range(draw, draw + size) for draw in own[:, ::size].ravel().tolist())

        def prefetch(draws: range) -> None:
            self.bank.prefetch(pairs.prompt_row[draws])

        for draws in announced(launches, prefetch, ahead=max(1, PAIRS_AHEAD // size)):
            yield make_batch(
                self.bank,
                pairs,
                draws,
                seed=self.seed,
                draw_times=self.draw_times,
                empty_prompt_fraction=self.training.empty_prompt_fraction,
                empty_conditioning=self.empty_conditioning,
            )


class Guard:
    """Checks that losses and gradients are finite, with one synchronisation per update.

    Args:
        trainable: parameters whose gradients are checked: by their norm, once per update. Under ZeRO, which takes
            gradients away as soon as they are computed, hooks sum them in fp32.
        sharded: whether ZeRO is on.
    """

    def __init__(self, trainable: Sequence[nn.Parameter], device: torch.device, *, sharded: bool) -> None:
        self.total = torch.zeros((), device=device)
        self.norm = torch.zeros((), device=device)
        self.whole = []
        for parameter in trainable:
            if sharded:
                parameter.register_hook(self.see)
            else:
                self.whole.append(parameter)

    def see(self, value: Tensor) -> None:
        """Add a loss or gradient to the running sum, which is finite only if every term is."""
        self.total += value.detach().sum(dtype=torch.float32)

    def verdict(self, *, stops: bool) -> tuple[bool, bool]:
        """Whether any worker has seen a non-finite value, and whether any has its stop flag set; the same on all.

        The only point of an update that synchronises with the device. Resets the running sum; sets ``norm``, the norm
        of all gradients, unless hooks sum them.
        """
        if gradients := [parameter.grad for parameter in self.whole if parameter.grad is not None]:
            self.norm = get_total_norm(gradients)
            self.total += self.norm
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
        on_check: called after each comparison of the errors with the bound of ``health``.
        on_checkpoint: called with all records read where a checkpoint is due: every ``updates_per_commit`` updates,
            after each stage, and before stopping.
    """

    pairs_of_stage: Callable[[TrainingState], StagePairs]
    stops: Callable[[], bool] = lambda: False
    on_update: Callable[[TrainingState], Any] = lambda state: None
    on_check: Callable[[TrainingState], Any] = lambda state: None
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
        State after the last update; its ``stage`` is ``num_stages + 1`` once all stages are done. An alarm that stops
        training ends its stage.

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
    measured = policy.trainable if section.method == "lora" and section.zero_stage < 3 else []
    mean_margin = torch.tensor(state.mean_margin).to(engine.device)
    if section.adaptive_beta:
        preference_loss = functools.partial(
            preference_loss, adaptive_beta=section.adaptive_beta, mean_margin=mean_margin
        )
    launches: list[Tensor] = []
    unread: list[Tensor] = []
    for _ in () if state.is_stopped else range(state.stage, num_stages + 1):
        policy.begin_stage(state.stage)
        pairs = callbacks.pairs_of_stage(state)
        num_updates = len(pairs.chosen) // section.global_batch_size
        learning_rate = _learning_rate(section, num_stages * num_updates)
        for number, batch in enumerate(prefetched(feed.launches(pairs, after=state.cursor)), start=1):
            batch = batch.to(model.device, model.dtype)
            loss, metrics = loss_of_pairs(policy, batch, preference_loss=preference_loss, safeguard=section.safeguard)
            guard.see(loss)
            engine.backward(loss)
            launches.append(metrics)
            if number % per_update:
                engine.step()  # accumulates: the update is not complete
                continue
            skips, stopping = guard.verdict(stops=callbacks.stops())
            engine.basic_optimizer.skips = skips
            for group in engine.basic_optimizer.param_groups:
                group["lr"] = learning_rate(state.num_updates + 1)
            metrics = torch.stack(launches).mean(dim=0)
            launches.clear()
            unread.append(torch.cat([metrics, step_and_measure(engine, guard, measured, section.max_grad_norm)]))
            if section.adaptive_beta and not skips:
                margin = mean_over_workers(metrics[METRICS.index("margin")])
                mean_margin.lerp_(margin, 1 - MEAN_MARGIN_MOMENTUM)
            state = state.after_update(skipped=skips)
            callbacks.on_update(state)
            if state.num_skipped_last >= min(section.max_skipped_updates, num_updates):
                raise TrainingError(
                    f"training: loss or gradient not finite in the last {state.num_skipped_last} updates, up to update"
                    f" {state.num_updates} (stage {state.stage}); lower `training.learning_rate` or `training.beta`, or"
                    " use a wider `model.dtype`"
                )
            at_end = state.cursor == num_updates
            checks = state.num_updates % section.health.window == 0 or (at_end and state.stage == num_stages)
            is_due = at_end or stopping or state.num_updates % section.updates_per_commit == 0
            if checks or is_due:
                state = replace(_with_records(state, unread, learning_rate), mean_margin=mean_margin.item())
                unread.clear()
            if checks:
                state = state.after_check(section.health)
                callbacks.on_check(state)
            if is_due or state.is_stopped:
                state = state.after_stage() if at_end or state.is_stopped else state
                callbacks.on_checkpoint(state)
            if stopping or state.is_stopped:
                return state
    return state


def summarize(records: Sequence[UpdateRecord], stage: int, pairs_per_update: int) -> dict[str, Any]:
    """Number of updates and pairs of a stage, and the means of its `METRICS`, without skipped updates."""
    mine = [record for record in records if record["stage"] == stage]
    means = {name: sum(record[name] for record in mine) / len(mine) for name in METRICS}
    return {"stage": stage, "num_updates": len(mine), "num_pairs": len(mine) * pairs_per_update, **means}


def mean_over_workers(values: Tensor) -> Tensor:
    """Mean of each value over the workers; collective."""
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()


def _learning_rate(section: TrainingSection, num_updates: int) -> Callable[[int], float]:
    """Learning rate by update; ``num_updates``: of all stages, which have equally many."""
    return functools.partial(
        learning_rate_at, peak=section.learning_rate, num_updates=num_updates, **section.schedule.model_dump()
    )


def step_and_measure(
    engine: deepspeed.DeepSpeedEngine, guard: Guard, measured: Sequence[nn.Parameter], max_grad_norm: float
) -> Tensor:
    """Let the engine update the weights; returns `NORMS` on the device, the second only if there are parameters.

    fp32 gradients without ZeRO are clipped here, because DeepSpeed would compute their norm again, with several kernels
    per parameter, and wait for the device twice.

    Args:
        measured: parameters whose change is measured; they are copied for that.
    """
    if not engine.gradient_clipping():
        clip_grads_with_norm_(guard.whole, max_grad_norm, guard.norm)
    with torch.no_grad():
        before = parameters_to_vector(measured) if measured else None  # one copy, not one per parameter
    engine.step()
    of_engine = engine.get_global_grad_norm()  # None: neither ZeRO nor 16-bit parameters
    grad_norm = guard.norm if of_engine is None else torch.as_tensor(of_engine, device=engine.device)
    norms = [grad_norm.float()]
    if before is not None:
        with torch.no_grad():
            norms.append((parameters_to_vector(measured) - before).norm())
    return torch.stack(norms)


def _with_records(state: TrainingState, unread: list[Tensor], learning_rate: Callable[[int], float]) -> TrainingState:
    """Append one record per update: metrics averaged over launches and workers, norms and learning rate.

    Args:
        unread: `METRICS` and `NORMS` of each of the last updates, on the device.
    """
    first = state.num_updates - len(unread) + 1
    read = [
        {
            "update": update,
            "stage": state.stage,
            **dict(zip((*METRICS, *NORMS), line, strict=False)),
            "learning_rate": learning_rate(update),
        }
        for update, line in enumerate(mean_over_workers(torch.stack(unread)).tolist(), start=first)
        if update not in state.skipped
    ]
    return replace(state, records=(*state.records, *read))

"""The training loop with a DeepSpeed engine, one worker, without Ray."""

import dataclasses
import itertools
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_policies import training_section
from torch import Tensor
from worker_processes import run_workers

from cdpo_ray.config.training import HealthSection, LoraSection
from cdpo_ray.errors import TrainingError
from cdpo_ray.models import load_model
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.randomness.noise import generator_at
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import StagePairs
from cdpo_ray.training.engine import restore_training, start_engine, training_tensors
from cdpo_ray.training.loop import Callbacks, Feed, Guard, TrainingState, step_and_measure, summarize, train_stages
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import METRICS, PreferenceLoss

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_worker")]

LORA = LoraSection(rank=2, targets=("to_q",))
GROWING = LoraSection(rank=2, initial_rank=1, unfreeze="from_input", targets=("to_v",))
DORA = GROWING.model_copy(update={"use_dora": True, "use_rslora": True, "alpha": 2.0})

ANY_RISE = 1e-9

LOSS: PreferenceLoss = partial(preference_loss, beta=500)
SECTION = training_section(
    global_batch_size=2,
    batch_size_per_worker=1,
    empty_prompt_fraction=0.5,
    schedule={"warmup_updates": 2, "decay": "cosine"},
    adaptive_beta=0.6,
    safeguard=0.9,
)


class Training:
    """One engine on a tiny net, with the feed of two stages of three updates."""

    def __init__(self, folder: Path, lora: LoraSection = LORA, *, worker_rank: int = 0, num_workers: int = 1) -> None:
        self.model = load_model("stable_diffusion", path=str(folder), device="cpu", for_training=True)
        self.policy = make_policy(self.model, lora, num_stages=2)
        self.engine = start_engine(self.model.denoiser, self.policy.trainable, SECTION, num_workers=num_workers)
        numbers = torch.Generator().manual_seed(0)
        bank = SampleBank(
            torch.randn(2, 3, 4, 8, 8, generator=numbers),
            {"prompt_embedding": torch.randn(2, 77, 32, generator=numbers)},
            np.arange(2),
        )
        self.feed = Feed(
            bank,
            self.model.draw_times,
            {"prompt_embedding": torch.zeros(1, 77, 32)},
            SECTION,
            7,
            worker_rank,
            num_workers,
        )
        draws = np.random.default_rng(0).integers(0, 2, 6)
        self.stages = [StagePairs(stage, draws, np.zeros(6, int), np.full(6, stage)) for stage in (1, 2)]
        self.num_updates: list[int] = []
        self.committed: list[TrainingState] = []
        self.checked: list[TrainingState] = []

    def train(
        self,
        state: TrainingState,
        *,
        loss: PreferenceLoss = LOSS,
        stop_after: int | None = None,
        updates_per_commit: int = 100,
        max_skipped_updates: int = 20,
        health: HealthSection = SECTION.health,
    ) -> TrainingState:
        """Train from this state, up to ``stop_after`` updates in total."""
        self.num_updates.clear()
        self.committed.clear()
        self.checked.clear()
        keys = {
            "updates_per_commit": updates_per_commit,
            "max_skipped_updates": max_skipped_updates,
            "health": health,
        }
        feed = dataclasses.replace(self.feed, training=SECTION.model_copy(update=keys))
        callbacks = Callbacks(
            lambda state: self.stages[state.stage - 1],
            stops=lambda: stop_after is not None and len(self.num_updates) + state.num_updates + 1 >= stop_after,
            on_update=lambda state: self.num_updates.append(state.num_updates),
            on_check=self.checked.append,
            on_checkpoint=self.committed.append,
        )
        return train_stages(
            self.engine, self.policy, feed, state, callbacks, num_stages=len(self.stages), preference_loss=loss
        )

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in training_tensors(self.engine)}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in get_peft_model_state_dict(self.model.denoiser).items()}


@pytest.mark.parametrize("stop_after", [2, 3, 4], ids=["in a stage", "at its end", "in the next"])
@pytest.mark.parametrize("lora", [LORA, GROWING, DORA], ids=["constant", "growing", "growing DoRA"])
def test_resumed_training_ends_with_identical_weights_moments_and_records(
    tiny_sd15: Path, lora: LoraSection, stop_after: int
) -> None:
    whole = Training(tiny_sd15, lora)
    expected = whole.train(TrainingState())
    first = Training(tiny_sd15, lora)
    stopped = first.train(TrainingState(), stop_after=stop_after)
    assert stopped.num_updates == stop_after
    second = Training(tiny_sd15, lora)
    second.train(TrainingState(), stop_after=1)  # weights and moments that must be replaced
    restore_training(second.engine, first.state().__getitem__)
    assert second.train(stopped) == expected
    assert second.num_updates == list(range(stop_after + 1, 7))
    found = second.state()
    for name, value in whole.state().items():
        assert torch.equal(value, found[name]), name


def test_checkpoints_are_due_every_updates_per_commit_updates_and_after_each_stage(tiny_sd15: Path) -> None:
    training = Training(tiny_sd15)
    training.train(TrainingState(), updates_per_commit=2)
    assert [(state.num_updates, state.stage, state.cursor) for state in training.committed] == [
        (2, 1, 2), (3, 2, 0), (4, 2, 1), (6, 3, 0)
    ]  # fmt: skip
    assert [len(state.records) for state in training.committed] == [2, 3, 4, 6]


@pytest.mark.parametrize("lora", [GROWING, DORA], ids=["LoRA", "DoRA"])
def test_a_growing_lora_trains_the_rank_and_blocks_of_each_stage(tiny_sd15: Path, lora: LoraSection) -> None:
    training = Training(tiny_sd15, lora)
    before = training.weights()
    state = training.train(TrainingState(), stop_after=3)
    first = training.weights()
    training.train(state)
    second = training.weights()
    for name in (name for name in first if "lora_B" in name):
        assert first[name][:, 1:].abs().max() == 0
        assert (first[name].abs().max() > 0) == ("up_blocks" not in name)
        assert second[name].abs().amax(dim=0).min() > 0
    magnitudes = [name for name in first if "magnitude" in name]
    assert len(magnitudes) == (lora.use_dora and len(first) // 3)
    for name in magnitudes:
        moved = [float((then[name] - now[name]).abs().max()) for then, now in ((before, first), (first, second))]
        assert (moved[0] < 1e-6) == ("up_blocks" in name), "weight decay moves all, by less"
        assert moved[1] > 1e-5


def test_every_stage_is_trained_and_every_update_recorded(tiny_sd15: Path) -> None:
    training = Training(tiny_sd15)
    state = training.train(TrainingState())
    assert state.stage == 3
    assert [(record["update"], record["stage"]) for record in state.records] == [
        (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)
    ]  # fmt: skip
    assert training.num_updates == [1, 2, 3, 4, 5, 6]
    for stage in (1, 2):
        mine = [record for record in state.records if record["stage"] == stage]
        summary = summarize(state.records, stage, 2)
        assert summary["num_pairs"] == 6
        for name in METRICS:
            assert summary[name] == pytest.approx(np.mean([record[name] for record in mine]))


def test_every_update_records_its_learning_rate_and_the_norms_of_gradient_and_change(tiny_sd15: Path) -> None:
    training = Training(tiny_sd15)
    weights = [training.weights()]
    gradients: list[float] = []
    backward, launches = training.engine.backward, itertools.count(1)

    def backward_and_note(loss: Tensor) -> None:
        backward(loss)
        if next(launches) % 2 == 0:  # the second launch of an update, after which gradients are complete
            found = [value.grad for value in training.policy.trainable if value.grad is not None]
            gradients.append(float(torch.stack([value.norm() for value in found]).norm()))

    training.engine.backward = backward_and_note
    for stop_after in range(1, 7):
        state = training.train(training.committed[-1] if training.committed else TrainingState(), stop_after=stop_after)
        weights.append(training.weights())
    assert [record["grad_norm"] for record in state.records] == pytest.approx(gradients, rel=1e-5)
    for record, before, after in zip(state.records, weights, weights[1:], strict=False):
        change = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
        assert record["update_norm"] == pytest.approx(float(change), rel=1e-4)
        assert record["error_change_w"] == pytest.approx(
            record["policy_error_w"] - record["reference_error_w"], abs=1e-6
        )
    rates = [
        1e-3 * factor for factor in (0.5, 1, 1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2)
    ]
    assert [record["learning_rate"] for record in state.records] == pytest.approx(rates)
    assert training.engine.basic_optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])


@pytest.mark.parametrize("share", [0.5, 2.0], ids=["above the bound", "below it"])
def test_the_optimizer_gets_gradients_scaled_down_to_the_bound_of_their_norm(tiny_sd15: Path, share: float) -> None:
    training = Training(tiny_sd15)
    guard = Guard(training.policy.trainable, training.engine.device, sharded=False)
    numbers = torch.Generator().manual_seed(0)
    gradients = [torch.randn(value.shape, generator=numbers) for value in training.policy.trainable]
    for parameter, gradient in zip(training.policy.trainable, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    given: list[Tensor] = []
    step = training.engine.basic_optimizer.step

    def step_and_note() -> None:
        given.extend(value.grad.clone() for value in training.policy.trainable if value.grad is not None)
        step()

    training.engine.basic_optimizer.step = step_and_note
    guard.verdict(stops=False)
    training.engine.set_gradient_accumulation_boundary(True)
    step_and_measure(training.engine, guard, [], share * norm)
    for gradient, clipped in zip(gradients, given, strict=True):
        torch.testing.assert_close(clipped, gradient * min(1.0, share))


def test_an_alarm_warns_at_every_comparison_above_the_bound_and_changes_no_weights(tiny_sd15: Path) -> None:
    quiet, warned = Training(tiny_sd15), Training(tiny_sd15)
    quiet.train(TrainingState(), health=HealthSection(max_error_rise=None))
    state = warned.train(TrainingState(), health=HealthSection(max_error_rise=ANY_RISE, window=2))
    assert [checked.num_updates for checked in warned.checked] == [2, 4, 6]
    rises = [np.mean([record["error_change_w"] for record in state.records[end - 2 : end]]) for end in (2, 4, 6)]
    assert max(rises) > ANY_RISE, "else this tests nothing"
    expected = [end for end, rise in zip((2, 4, 6), rises, strict=True) if rise > ANY_RISE]
    assert [alarm.update for alarm in state.alarms] == expected
    assert state.stage == 3 and not state.is_stopped
    for name, value in quiet.state().items():
        assert torch.equal(value, warned.state()[name])


def test_fault_63_training_that_an_alarm_stopped_is_done_and_repeats_no_update_on_resume(tiny_sd15: Path) -> None:
    """The first update has no rise: the policy is the reference. The first rise after it stops training."""
    training, health = Training(tiny_sd15), HealthSection(max_error_rise=ANY_RISE, window=1, on_alarm="stop")
    state = training.train(TrainingState(), health=health)
    last = state.num_updates
    assert state.is_stopped and [alarm.update for alarm in state.alarms] == [last] and 1 < last < 6
    assert training.committed[-1] == state and state.cursor == 0
    assert [record["update"] for record in state.records] == list(range(1, last + 1))
    assert all(record["error_change_w"] <= 1e-8 for record in state.records[:-1])
    kept = training.state()
    resumed = TrainingState.of(json.loads(json.dumps(dataclasses.asdict(state))))
    assert training.train(resumed, health=health) == resumed == state
    assert training.num_updates == [] and training.committed == []
    assert all(torch.equal(value, kept[name]) for name, value in training.state().items())


def test_an_alarm_does_not_stop_a_stage_whose_updates_were_all_skipped() -> None:
    health = HealthSection(max_error_rise=0.1, window=4, on_alarm="stop")
    record = {"policy_error_w": 2.0, "reference_error_w": 1.0}
    records = tuple({**record, "update": update, "stage": 1} for update in (5, 6))
    state = TrainingState(stage=2, cursor=2, records=records, skipped=(7, 8), num_updates=8)
    assert state.after_check(health) == state
    assert len(state.after_check(health.model_copy(update={"on_alarm": "warn"})).alarms) == 1
    later = dataclasses.replace(state, records=(*records, {**record, "update": 8, "stage": 2}), skipped=(7,))
    assert later.after_check(health).is_stopped


def test_a_checkpoint_of_another_version_is_named() -> None:
    saved = dataclasses.asdict(TrainingState())
    del saved["alarms"], saved["mean_margin"]
    with pytest.raises(TrainingError, match=r"lacks alarms, mean_margin: another version wrote it; resume with that"):
        TrainingState.of(saved)


def test_reference_stays_the_base_while_the_policy_moves(tiny_sd15: Path) -> None:
    """The same draw again after training: reference errors are unchanged, policy errors are not."""
    training = Training(tiny_sd15)
    before = training.train(TrainingState()).records[0]
    after = training.train(TrainingState()).records[0]
    assert before["policy_error_w"] == before["reference_error_w"]
    assert after["reference_error_w"] == before["reference_error_w"]
    assert after["reference_error_l"] == before["reference_error_l"]
    assert after["policy_error_w"] != before["policy_error_w"]


def gradient_breaks_at(*launches: int) -> PreferenceLoss:
    """Loss whose value is always finite, and whose gradient is not at these launches."""
    calls = itertools.count(1)

    def loss(*errors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        losses, margins = preference_loss(*errors, beta=500, **options)
        if next(calls) in launches:
            losses = losses + torch.sqrt(margins * 0)  # 0, of slope inf
        return losses, margins

    return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_fault_09_a_non_finite_update_is_skipped_and_counted_and_changes_nothing(tiny_sd15: Path, what: str) -> None:
    training = Training(tiny_sd15)
    before = training.train(TrainingState(), stop_after=2)
    kept = training.state()
    latents, broken = training.feed.bank.latents, training.feed.bank.latents.clone()
    if what == "loss":
        broken[:, 1] = float("nan")  # what stage 1 rejects
        training.feed = dataclasses.replace(training.feed, bank=dataclasses.replace(training.feed.bank, latents=broken))
    loss = gradient_breaks_at(2) if what == "gradient" else LOSS
    after = training.train(before, stop_after=3, loss=loss)
    assert after.skipped == (3,)
    assert [record["update"] for record in after.records] == [1, 2]
    assert all(torch.equal(value, kept[name]) for name, value in training.state().items())
    training.feed = dataclasses.replace(training.feed, bank=dataclasses.replace(training.feed.bank, latents=latents))
    last = training.train(after)
    assert [record["update"] for record in last.records] == [1, 2, 4, 5, 6]
    assert all(value.isfinite().all() for value in training.state().values())
    assert last.num_updates == 6 and last.num_skipped_last == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_guard_detects_non_finite_values_and_accepts_large_gradients(dtype: torch.dtype, sharded: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    guard = Guard([parameter], torch.device("cpu"), sharded=sharded)
    for factor, is_bad in ((60_000, False), (float("inf"), True), (float("nan"), True), (1, False)):
        parameter.grad = None
        (parameter * factor).float().sum().backward()
        assert guard.verdict(stops=False) == (is_bad, False)


def test_fault_09_consecutive_skipped_updates_stop_training(tiny_sd15: Path) -> None:
    training = Training(tiny_sd15)
    training.feed.bank.latents[:, 2] = float("nan")  # what stage 2 rejects
    with pytest.raises(TrainingError, match=r"gradient not finite in the last 2 updates, up to update 5 \(stage 2\)"):
        training.train(TrainingState(), max_skipped_updates=2)


def train_as_one_of_two(rank: int, folder: Path, model_dir: Path) -> None:
    """Train in a group of two; write the noise that every launch used."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    training = Training(model_dir, worker_rank=rank, num_workers=2)
    used: list[Tensor] = []
    pose = training.model.denoising_task

    def posed(*given: Any) -> Any:
        used.append(given[-1][0])
        return pose(*given)

    training.model.denoising_task = posed  # type: ignore[method-assign]
    training.train(TrainingState())
    assert training.num_updates == [1, 2, 3, 4, 5, 6]
    save_file({str(launch): noise.contiguous() for launch, noise in enumerate(used)}, folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_with_two_workers_and_prefetching_each_is_served_its_draws_of_the_same_stage_at_every_update(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    run_workers(train_as_one_of_two, tmp_path, tiny_sd15, num_workers=2)
    for rank in (0, 1):
        used = load_file(tmp_path / f"{rank}.safetensors")
        assert len(used) == 6
        for update in range(6):
            stage, draw = 1 + update // 3, 2 * (update % 3) + rank
            generator = generator_at(7, "training", stage, draw)
            torch.randint(1000, (), generator=generator)  # the timestep
            torch.rand((), generator=generator)  # whether the prompt is emptied
            assert torch.equal(used[str(update)], torch.randn(4, 8, 8, generator=generator)), (rank, update)


class Recorder(SampleBank):
    """Records the prompts whose samples must fit on the disk, and those that are fetched."""

    def expect(self, rows: NDArray[np.int64]) -> None:
        expected.extend(rows.tolist())

    def prefetch(self, rows: NDArray[np.int64]) -> None:
        fetched.extend(rows.tolist())


expected: list[int] = []
fetched: list[int] = []


@pytest.mark.parametrize(("rank", "own"), [(0, [8, 9, 10, 11, 16, 17, 18, 19]), (1, [12, 13, 14, 15, 20, 21, 22, 23])])
def test_a_worker_needs_and_fetches_the_samples_of_its_own_draws_alone(rank: int, own: list[int]) -> None:
    expected.clear()
    fetched.clear()
    section = training_section(global_batch_size=8, batch_size_per_worker=2, num_workers=2)
    bank = Recorder(torch.zeros(24, 2, 1, 1, 1), {"prompt_embedding": torch.zeros(24, 1, 1)}, np.arange(24))
    empty = {"prompt_embedding": torch.zeros(1, 1, 1)}
    feed = Feed(bank, lambda generator: {"timestep": torch.tensor(0)}, empty, section, 0, rank, 2)
    pairs = StagePairs(1, np.arange(24), np.zeros(24, int), np.ones(24, int))
    assert len([*feed.launches(pairs, after=1)]) == 4
    assert expected == fetched == own

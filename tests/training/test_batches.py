"""A batch is a function of its position alone."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import PairBatch, StagePairs, announced, make_batch, prefetched

SHAPE = (2, 3, 4)
EMPTY = torch.full((5, 6), -1.0)
NUM_DRAWS = 40


@pytest.fixture
def bank() -> SampleBank:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(7, 4, *SHAPE, generator=generator)
    return SampleBank(latents, {"prompt_embedding": torch.rand(7, 5, 6, generator=generator)}, np.arange(7))


@pytest.fixture
def pairs() -> StagePairs:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, 4, NUM_DRAWS)
    return StagePairs(3, rng.integers(0, 7, NUM_DRAWS), chosen, (chosen + rng.integers(1, 4, NUM_DRAWS)) % 4)


def batch_of(
    bank: SampleBank, pairs: StagePairs, draws: range = range(NUM_DRAWS), *, seed: int = 0, fraction: float = 0.0
) -> PairBatch:
    return make_batch(
        bank,
        pairs,
        draws,
        seed=seed,
        draw_times=lambda generator: {"timestep": torch.randint(1000, (), generator=generator)},
        empty_prompt_fraction=fraction,
        empty_conditioning={"prompt_embedding": EMPTY[None]},
    )


def columns(batch: PairBatch) -> dict[str, torch.Tensor]:
    return {
        "latents_w": batch.latents_w,
        "latents_l": batch.latents_l,
        "embeddings": batch.conditioning["prompt_embedding"],
        "timesteps": batch.times["timestep"],
        "noise": batch.noise,
    }


def test_chosen_and_rejected_are_the_rows_of_the_stage(bank: SampleBank, pairs: StagePairs) -> None:
    batch = batch_of(bank, pairs, range(10, 30))
    for place, draw in enumerate(range(10, 30)):
        row, chosen, rejected = int(pairs.prompt_row[draw]), int(pairs.chosen[draw]), int(pairs.rejected[draw])
        assert torch.equal(batch.latents_w[place], bank.latents[row][chosen])
        assert torch.equal(batch.latents_l[place], bank.latents[row][rejected])
        assert torch.equal(batch.conditioning["prompt_embedding"][place], bank.conditioning["prompt_embedding"][row])


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_a_draw_is_the_same_however_the_batches_are_cut(bank: SampleBank, pairs: StagePairs, size: int) -> None:
    whole = columns(batch_of(bank, pairs, fraction=0.3))
    cuts = [range(start, min(start + size, NUM_DRAWS)) for start in range(0, NUM_DRAWS, size)]
    made = {cut: columns(batch_of(bank, pairs, cut, fraction=0.3)) for cut in reversed(cuts)}  # in another order
    for name, values in whole.items():
        assert torch.equal(torch.cat([made[cut][name] for cut in cuts]), values), name


def test_latents_of_encoded_images_are_drawn_from_their_posterior(bank: SampleBank, pairs: StagePairs) -> None:
    std = torch.linspace(0, 2, bank.latents.numel()).reshape(bank.latents.shape)
    spread, plain = batch_of(replace(bank, latents_std=std), pairs), batch_of(bank, pairs)
    rows = pairs.prompt_row
    drawn = []
    for name, samples in (("latents_w", pairs.chosen), ("latents_l", pairs.rejected)):
        drawn.append((getattr(spread, name) - bank.latents[rows, samples]) / std[rows, samples].clamp_min(1e-6))
    values = torch.stack(drawn)[..., 1:]  # where the standard deviation is 0 the quotient is undefined
    assert abs(float(values.mean())) < 0.1
    assert abs(float(values.std()) - 1) < 0.1
    assert abs(float((values[0] * values[1]).mean())) < 0.1  # chosen and rejected are drawn independently
    for name in ("noise", "timesteps", "embeddings"):
        assert torch.equal(columns(spread)[name], columns(plain)[name]), name
    again = batch_of(replace(bank, latents_std=std), pairs, range(7, 9))
    assert torch.equal(again.latents_w, spread.latents_w[7:9])


def test_each_draw_stage_and_seed_has_different_noise(bank: SampleBank, pairs: StagePairs) -> None:
    batches = [batch_of(bank, pairs), batch_of(bank, replace(pairs, stage=4)), batch_of(bank, pairs, seed=1)]
    noise = torch.cat([batch.noise for batch in batches]).flatten(1)
    assert len(torch.unique(noise, dim=0)) == 3 * NUM_DRAWS
    assert not torch.equal(batches[0].times["timestep"], batches[1].times["timestep"])
    assert not torch.equal(batches[0].times["timestep"], batches[2].times["timestep"])


def many(pairs: StagePairs, count: int) -> StagePairs:
    return replace(
        pairs, **{name: np.resize(getattr(pairs, name), count) for name in ("prompt_row", "chosen", "rejected")}
    )


def test_timesteps_are_uniform_over_0_to_999_and_noise_is_standard_normal(bank: SampleBank, pairs: StagePairs) -> None:
    batch = batch_of(bank, many(pairs, 4000), range(4000))
    assert batch.times["timestep"].dtype == torch.int64
    assert 0 <= batch.times["timestep"].min() < 10 and 990 <= batch.times["timestep"].max() <= 999
    counts = torch.bincount(batch.times["timestep"] // 100, minlength=10).double()
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi square of 9 degrees of freedom, 99.9 %
    noise = batch.noise.double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5


def test_the_empty_prompt_fraction_is_as_configured(bank: SampleBank, pairs: StagePairs) -> None:
    batch = batch_of(bank, many(pairs, 4000), range(4000), fraction=0.25)
    emptied = (batch.conditioning["prompt_embedding"] == EMPTY).all(dim=(1, 2))
    assert abs(emptied.double().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    kept = many(pairs, 4000).prompt_row[~emptied.numpy()]
    assert torch.equal(batch.conditioning["prompt_embedding"][~emptied], bank.conditioning["prompt_embedding"][kept])


def test_emptying_prompts_changes_neither_timesteps_nor_noise_nor_the_bank(bank: SampleBank, pairs: StagePairs) -> None:
    before = bank.conditioning["prompt_embedding"].clone()
    never, often = columns(batch_of(bank, pairs)), columns(batch_of(bank, pairs, fraction=0.9))
    assert not torch.equal(never.pop("embeddings"), often.pop("embeddings"))
    for name, values in never.items():
        assert torch.equal(values, often[name]), name
    assert torch.equal(bank.conditioning["prompt_embedding"], before)


def test_moving_a_batch_casts_all_but_noise_and_timesteps(bank: SampleBank, pairs: StagePairs) -> None:
    batch = batch_of(bank, pairs)
    moved = batch.to("cpu", torch.bfloat16)
    assert {name: values.dtype for name, values in columns(moved).items()} == {
        "latents_w": torch.bfloat16,
        "latents_l": torch.bfloat16,
        "embeddings": torch.bfloat16,
        "timesteps": torch.int64,
        "noise": torch.float32,
    }
    assert torch.equal(moved.latents_w, batch.latents_w.bfloat16()) and torch.equal(moved.noise, batch.noise)


def test_samples_and_pairs_are_read_by_prompt_index_whatever_the_order_of_the_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    latents = np.random.default_rng(0).normal(size=(3, 4, *SHAPE)).astype(np.float16)
    embeddings = np.random.default_rng(1).normal(size=(3, 5, 6)).astype(np.float32)
    indices = [4, 0, 2]  # prompts 1 and 3 are in quarantine
    rows = pa.table(
        {"prompt_index": indices, "latents": tensor_column(latents), "prompt_embedding": tensor_column(embeddings)}
    )
    pq.write_table(rows.slice(0, 2), tmp_path / "samples-000000.parquet")
    pq.write_table(rows.slice(2), tmp_path / "samples-000001.parquet")
    bank = SampleBank.open(tmp_path)
    assert bank.row_of_prompt.tolist() == [1, -1, 2, -1, 0]
    rows = np.arange(3)
    assert np.array_equal(bank.latents[rows].numpy(), latents)
    assert np.array_equal(bank.conditioning["prompt_embedding"][rows].numpy(), embeddings)

    drawn = {"draw": [2, 0, 1], "prompt_index": [0, 2, 4], "chosen": [1, 2, 3], "rejected": [0, 3, 1]}
    (tmp_path / "stage-2").mkdir()
    pq.write_table(pa.table(drawn), tmp_path / "stage-2" / "pairs-000000.parquet")
    pairs = StagePairs.read(tmp_path, 2, bank)
    assert pairs.stage == 2
    assert (pairs.prompt_row.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist()) == (
        [2, 0, 1],
        [2, 3, 1],
        [3, 1, 0],
    )
    batch = batch_of(bank, pairs, range(1, 2))
    assert np.array_equal(batch.latents_w[0].numpy(), latents[indices.index(4)][3])


@pytest.mark.parametrize("ahead", [0, 1, 3, 20])
def test_items_are_announced_in_order_as_many_ahead_as_asked_for(ahead: int) -> None:
    seen: list[int] = []
    for item in announced(range(10), seen.append, ahead=ahead):
        assert seen == [*range(min(item + ahead + 1, 10))]
    assert item == 9


def test_prefetching_yields_the_same_items() -> None:
    assert list(prefetched(range(20))) == list(range(20))
    assert list(prefetched(iter([]))) == []
    assert list(prefetched([None, False, 0])) == [None, False, 0]


def test_prefetching_raises_the_sources_error_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the disk is gone")

    items = prefetched(source())
    seen = [next(items), next(items)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)
    assert seen == [1, 2]


def test_prefetching_computes_one_item_ahead_and_no_more() -> None:
    made: list[int] = []
    second_made = threading.Event()

    def source() -> Iterator[int]:
        for item in range(10):
            made.append(item)
            if item == 1:
                second_made.set()
            yield item

    items = prefetched(source())
    assert next(items) == 0
    assert second_made.wait(10)
    time.sleep(0.05)
    assert made == [0, 1]
    items.close()  # type: ignore[attr-defined]

"""A bank on disk gives what the Parquet files hold, and reads only the row groups that it needs."""

import errno
import multiprocessing
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from object_store import serve

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.errors import StoreError
from cdpo_ray.store import private_folder, write_table
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import StagePairs, make_batch

COLUMNS = {"latents": (4, 2, 3, 5), "latents_std": (4, 2, 3, 5), "prompt_embedding": (5, 6)}
ROWS_PER_GROUP = 3
INDICES = (range(7), range(8, 17))
"""Prompts of the two shards; prompt 7 is in quarantine."""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def samples_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_samples(tmp_path / "1-samples", ROWS_PER_GROUP, monkeypatch)
    return tmp_path / "1-samples"


def write_samples(folder: Path, rows_per_group: int, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    row_bytes = 2 * sum(int(np.prod(shape)) for shape in COLUMNS.values())
    monkeypatch.setattr("cdpo_ray.store.tables.GROUP_BYTES", rows_per_group * row_bytes)
    if isinstance(folder, Path):
        folder.mkdir(exist_ok=True)
    for number, indices in enumerate(INDICES):
        tensors = {
            name: tensor_column(rng.normal(size=(len(indices), *shape)).astype(np.float16))
            for name, shape in COLUMNS.items()
        }
        write_table(pa.table({"prompt_index": list(indices), **tensors}), folder / f"samples-{number:012d}.parquet")


def as_stored(samples_dir: Path) -> dict[str, NDArray[np.float16]]:
    """All values, by pyarrow alone."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(samples_dir.glob("*.parquet")))
    return {
        name: np.array(table[name].to_pylist(), np.float16).reshape(len(table), *shape)
        for name, shape in COLUMNS.items()
    }


def assert_equal(bank: SampleBank, expected: dict[str, NDArray[np.float16]], *, seed: int = 0) -> None:
    rows = np.random.default_rng(seed).permutation(len(expected["latents"]))
    samples = np.random.default_rng(seed).integers(0, 4, len(rows))
    assert bank.latents_std is not None
    for name, column in {"latents": bank.latents, "latents_std": bank.latents_std, **bank.conditioning}.items():
        assert column.shape == expected[name].shape
        assert np.array_equal(column[rows].numpy(), expected[name][rows]), name
        assert np.array_equal(column[3].numpy(), expected[name][3]), name
        assert np.array_equal(column[[5, 5, 1]].numpy(), expected[name][[5, 5, 1]]), name
        if name != "prompt_embedding":
            assert np.array_equal(column[rows, samples].numpy(), expected[name][rows, samples]), name


def flags(bank: SampleBank) -> list[int]:
    assert bank.cache
    return [*(bank.cache.folder.path / "flags").read_bytes()]


@pytest.mark.parametrize("rows_per_group", [1, ROWS_PER_GROUP, 100])
def test_every_record_is_that_of_the_files_whatever_the_size_of_their_row_groups(
    rows_per_group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_samples(tmp_path / "1-samples", rows_per_group, monkeypatch)
    groups = [pq.read_metadata(path).num_row_groups for path in sorted((tmp_path / "1-samples").glob("*"))]
    assert groups == [-(-len(indices) // rows_per_group) for indices in INDICES]
    bank = SampleBank.open(tmp_path / "1-samples")
    assert_equal(bank, as_stored(tmp_path / "1-samples"))
    assert_equal(SampleBank.open(tmp_path / "1-samples"), as_stored(tmp_path / "1-samples"), seed=1)
    expected = [*INDICES[0], -1, *range(7, 16)]
    assert bank.row_of_prompt.tolist() == expected


def test_a_batch_is_byte_for_byte_that_of_a_bank_in_memory(samples_dir: Path) -> None:
    stored, on_disk = as_stored(samples_dir), SampleBank.open(samples_dir)
    tensors = {name: torch.from_numpy(values) for name, values in stored.items()}
    embedding = {"prompt_embedding": tensors["prompt_embedding"]}
    in_memory = SampleBank(tensors["latents"], embedding, on_disk.row_of_prompt, tensors["latents_std"])
    rng = np.random.default_rng(0)
    pairs = StagePairs(1, rng.integers(0, 16, 20), rng.integers(0, 4, 20), rng.integers(0, 4, 20))
    ours, theirs = (
        make_batch(
            bank,
            pairs,
            range(3, 17),
            seed=5,
            draw_times=lambda generator: {"timestep": torch.randint(1000, (), generator=generator)},
            empty_prompt_fraction=0.3,
            empty_conditioning={"prompt_embedding": torch.ones(1, 5, 6)},
        )
        for bank in (on_disk, in_memory)
    )
    assert torch.equal(ours.latents_w, theirs.latents_w) and torch.equal(ours.latents_l, theirs.latents_l)
    assert torch.equal(ours.conditioning["prompt_embedding"], theirs.conditioning["prompt_embedding"])
    assert torch.equal(ours.noise, theirs.noise) and torch.equal(ours.times["timestep"], theirs.times["timestep"])


def test_only_row_groups_that_are_needed_are_read(samples_dir: Path) -> None:
    bank = SampleBank.open(samples_dir)
    assert flags(bank) == []
    _ = bank.conditioning["prompt_embedding"][[4]]
    assert flags(bank) == [0, 1]
    bank.prefetch(np.array([15, 0]))
    _ = bank.latents[[15, 0], [0, 3]]
    assert flags(bank) == [1, 1, 0, 0, 0, 1]


def test_what_was_written_before_a_kill_is_not_used_without_its_flag(samples_dir: Path) -> None:
    bank = SampleBank.open(samples_dir)
    assert bank.cache
    for name in COLUMNS:
        (bank.cache.folder.path / name).write_bytes(b"\x01" * 100_000)
    assert_equal(bank, as_stored(samples_dir))


def read_at_once(worker_rank: int, samples_dir: Path) -> None:
    assert_equal(SampleBank.open(samples_dir), as_stored(samples_dir), seed=worker_rank)


def test_workers_that_read_at_once_read_the_same(samples_dir: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(read_at_once, [(0, samples_dir), (1, samples_dir)], chunksize=1)
    assert flags(SampleBank.open(samples_dir)) == [1] * 6


def test_samples_in_an_object_store_are_read_in_ranges() -> None:
    with serve() as bucket, pytest.MonkeyPatch.context() as patch:
        write_samples(bucket / "run" / "1-samples", ROWS_PER_GROUP, patch)
        local = Path(os.environ["TMPDIR"]) / "same"
        write_samples(local, ROWS_PER_GROUP, patch)
        bank = SampleBank.open(bucket / "run" / "1-samples")
        _ = bank.latents[[9], [0]]
        assert sum(flags(bank)) == 1
        assert_equal(bank, as_stored(local))


def test_fault_11_a_full_disk_is_named_with_what_is_needed_and_how_to_use_another(
    samples_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = SampleBank.open(samples_dir)
    bank.expect(np.arange(16))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(100))
        with pytest.raises(StoreError, match=r"samples-.*: needs 0\.0 MiB, but 0\.0 MiB are free .* set TMPDIR"):
            bank.expect(np.arange(2))

        def full(*arguments: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("os.pwrite", full)
        with pytest.raises(StoreError, match=r"samples cannot be kept here: No space left on device; .* set TMPDIR"):
            _ = bank.latents[[0]]


@pytest.mark.parametrize("kind", ["a link", "others may write to it"])
def test_fault_32_a_folder_that_others_can_change_is_refused(kind: str, samples_dir: Path, tmp_path: Path) -> None:
    folder = private_folder()
    folder.rmdir()
    if kind == "a link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(StoreError, match="belongs to another user, is a link, or can be written by others; set TMPDIR"):
        SampleBank.open(samples_dir)


def test_the_last_bank_deletes_the_files(samples_dir: Path) -> None:
    first, second = SampleBank.open(samples_dir), SampleBank.open(samples_dir)
    first.delete_cache()
    assert_equal(second, as_stored(samples_dir))
    second.delete_cache()
    assert not list(private_folder().iterdir())
    assert_equal(SampleBank.open(samples_dir), as_stored(samples_dir))


def test_files_that_nobody_has_used_for_days_are_deleted(samples_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, unused = SampleBank.open(samples_dir), SampleBank.open(samples_dir)
    write_samples(samples_dir, ROWS_PER_GROUP, monkeypatch, seed=1)
    assert used.cache and unused.cache
    left = used.cache.folder.path
    os.utime(left, (0, 0))
    other = SampleBank.open(samples_dir)
    assert left.is_dir()  # old, but in use
    os.utime(left, (0, 0))
    del used, unused
    other.delete_cache()
    other = SampleBank.open(samples_dir)
    assert not left.exists()
    assert_equal(other, as_stored(samples_dir))


def test_files_whose_rows_or_shapes_are_not_those_of_one_set_are_refused(samples_dir: Path, tmp_path: Path) -> None:
    mixed = pq.read_table(samples_dir / "samples-000000000000.parquet").take([1, 0, 2])
    (tmp_path / "mixed").mkdir()
    pq.write_table(mixed, tmp_path / "mixed" / "samples-0.parquet")
    with pytest.raises(StoreError, match=r"samples-0\.parquet: its rows are not in the order of their prompts"):
        _ = SampleBank.open(tmp_path / "mixed").latents[[0]]
    pq.write_table(mixed.drop_columns("latents_std"), samples_dir / "samples-1.parquet")
    with pytest.raises(StoreError, match=r"samples-1\.parquet: its tensors differ from those of samples-000000000000"):
        SampleBank.open(samples_dir)

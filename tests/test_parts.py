"""Rows become durable part by part; whatever an interruption leaves, every row is there once and in order."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray.parts import Part, find_parts, join_parts, join_set_aside, read_set_aside, shards_of, write_part
from cdpo_ray.store import PARTS


def rows(indices: Sequence[int]) -> pa.Table:
    prompts = [f"prompt {index}" * 100 for index in indices]
    return pa.table({"prompt_index": pa.array(indices, pa.int64()), "prompt": prompts})


@pytest.fixture
def parts_dir(tmp_path: Path) -> Path:
    (tmp_path / PARTS).mkdir()
    return tmp_path / PARTS


def written(parts_dir: Path, *groups: Sequence[int]) -> list[Path]:
    for indices in groups:
        write_part(rows(indices), parts_dir=parts_dir)
    return sorted(parts_dir.glob("*.parquet"))


def test_a_part_is_told_in_a_row_and_does_not_keep_how_many_images_were_made_at_once(parts_dir: Path) -> None:
    made = rows([4, 5]).append_column("images_per_batch", pa.array([8, 4]))
    (told,) = write_part(made, parts_dir=parts_dir).to_pylist()
    (path,) = parts_dir.iterdir()
    size = path.stat().st_size
    assert told == {"first": 4, "num_rows": 2, "num_bytes": size, "images_per_batch": 4}
    assert pq.read_table(path).equals(rows([4, 5]))


def test_rows_made_twice_are_the_same_one_file(parts_dir: Path) -> None:
    (path,) = written(parts_dir, [0, 1])
    first = path.read_bytes()
    assert written(parts_dir, [0, 1]) == [path] and path.read_bytes() == first


@pytest.mark.parametrize("kept_bytes", [0, 3, 1000, -1])
def test_fault_02_a_part_that_was_cut_off_is_deleted_and_not_counted(kept_bytes: int, parts_dir: Path) -> None:
    _, cut_off, _ = written(parts_dir, [0, 1], [2, 3], [4])
    cut_off.write_bytes(cut_off.read_bytes()[:kept_bytes])
    (parts_dir / "000000000005.parquet.tmp").write_bytes(b"PAR1")
    found, held = find_parts(parts_dir.parent, "samples")
    assert [part.first for part in found] == [0, 4] and held == {0, 1, 4}
    assert sorted(path.name for path in parts_dir.iterdir()) == ["000000000000.parquet", "000000000004.parquet"]


def test_fault_02_parts_whose_shard_is_there_are_not_counted_twice(parts_dir: Path) -> None:
    parts, shard = written(parts_dir, [0, 1], [2], [3]), parts_dir.parent / "samples-000000000000.parquet"
    kept = parts[1].read_bytes()
    join_parts(parts[:2], shard)
    parts[1].write_bytes(kept)  # as if the join had been broken off before it deleted this
    found, held = find_parts(parts_dir.parent, "samples")
    assert [(part.first, part.num_rows, part.is_shard) for part in found] == [(0, 3, True), (3, 1, False)]
    assert held == {0, 1, 2, 3} and not parts[1].exists()


@pytest.mark.parametrize("broken_off_after", ["nothing", "the shard", "one part", "all"])
def test_a_join_done_again_after_it_was_broken_off_gives_the_same_shard(broken_off_after: str, parts_dir: Path) -> None:
    parts, shard = written(parts_dir, [0, 1], [2], [3, 4]), parts_dir.parent / "samples-000000000000.parquet"
    kept = {path: path.read_bytes() for path in parts}
    join_parts(parts, shard)
    whole = shard.read_bytes()
    if broken_off_after == "nothing":
        shard.unlink()
    for path in {"nothing": parts, "the shard": parts, "one part": parts[1:], "all": []}[broken_off_after]:
        path.write_bytes(kept[path])
    join_parts(parts, shard)
    assert shard.read_bytes() == whole and not list(parts_dir.iterdir())
    assert pq.read_table(shard).equals(rows([0, 1, 2, 3, 4]))


def test_a_shard_does_not_depend_on_how_its_rows_were_parted(parts_dir: Path) -> None:
    made = []
    for number, groups in enumerate([([0, 1], [2, 3]), ([0], [1, 2], [3])]):
        join_parts(written(parts_dir, *groups), parts_dir.parent / f"{number}.parquet")
        made.append((parts_dir.parent / f"{number}.parquet").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("sizes", "shards", "expected"),
    [
        ([1, 1, 1], [], [[0, 1, 2]]),
        ([4, 4, 4, 4], [], [[0, 1, 2], [3]]),
        ([12, 3, 20, 1], [], [[0], [1, 2], [3]]),
        ([4, 12, 4, 9], [1], [[0], [2, 3]]),  # what lies on both sides of a shard does not join
        ([12], [0], []),
        ([], [], []),
    ],
)
def test_neighbours_join_until_a_shard_is_large_enough(
    sizes: list[int], shards: list[int], expected: list[list[int]]
) -> None:
    parts = [Part(first, 1, size, Path(), first in shards) for first, size in enumerate(sizes)]
    assert [[part.first for part in group] for group in shards_of(parts, 10)] == expected


def test_what_was_set_aside_is_joined_once_and_stays_known_after(tmp_path: Path) -> None:
    assert join_set_aside(tmp_path) == [] and not list(tmp_path.iterdir())
    (tmp_path / "set_aside").mkdir()
    (tmp_path / "set_aside" / "000000000007.jsonl").write_text('{"prompt_index": 7}\n')
    (tmp_path / "set_aside.jsonl").write_text('{"prompt_index": 3}\n{"prompt_index": 7}\n')
    expected = [{"prompt_index": 3}, {"prompt_index": 7}]
    assert join_set_aside(tmp_path) == expected == read_set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set_aside.jsonl"]

"""Rows become durable part by part; after any interruption, every row exists once and in order."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray.dataflow.columns import list_column, tensor_column
from cdpo_ray.dataflow.parts import (
    Part,
    find_parts,
    in_order,
    join_parts,
    join_quarantined,
    read_quarantined,
    refuse_large_rows,
    shards_of,
    whole_prompts,
    write_part,
    write_quarantined,
)
from cdpo_ray.errors import GenerationError, StoreError
from cdpo_ray.store import PARTS, write_table


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


def test_a_part_is_described_by_a_row_and_does_not_store_the_batch_size(parts_dir: Path) -> None:
    made = rows([4, 5]).append_column("images_per_batch", pa.array([8, 4]))
    (row,) = write_part(made, parts_dir=parts_dir).to_pylist()
    (path,) = parts_dir.iterdir()
    size = path.stat().st_size
    assert row == {
        "name": path.name,
        "first": 4,
        "image_start": 0,
        "num_rows": 2,
        "num_bytes": size,
        "num_images": None,
        "images_per_batch": 4,
    }
    assert pq.read_table(path).equals(rows([4, 5]))


def test_rows_made_twice_give_one_file(parts_dir: Path) -> None:
    (path,) = written(parts_dir, [0, 1])
    first = path.read_bytes()
    assert written(parts_dir, [0, 1]) == [path] and path.read_bytes() == first


@pytest.mark.parametrize("kept_bytes", [0, 3, 1000, -1])
def test_fault_02_a_truncated_part_is_deleted_and_not_counted(kept_bytes: int, parts_dir: Path) -> None:
    _, cut_off, _ = written(parts_dir, [0, 1], [2, 3], [4])
    cut_off.write_bytes(cut_off.read_bytes()[:kept_bytes])
    (parts_dir / "000000000005.parquet.tmp").write_bytes(b"PAR1")
    found, held = find_parts(parts_dir.parent, "samples", 1)
    assert [part.first for part in found] == [0, 4] and held.keys() == {0, 1, 4}
    assert sorted(path.name[:12] for path in parts_dir.iterdir()) == ["000000000000", "000000000004"]


def test_fault_02_parts_whose_shard_exists_are_not_counted_twice(parts_dir: Path) -> None:
    parts, shard = written(parts_dir, [0, 1], [2], [3]), parts_dir.parent / "samples-000000000000.parquet"
    kept = parts[1].read_bytes()
    join_parts(parts[:2], shard, 1)
    parts[1].write_bytes(kept)  # as if the join had been interrupted before it deleted this part
    found, held = find_parts(parts_dir.parent, "samples", 1)
    assert [(part.first, part.num_rows, part.is_shard) for part in found] == [(0, 3, True), (3, 1, False)]
    assert held.keys() == {0, 1, 2, 3} and not parts[1].exists()


@pytest.mark.parametrize("broken_off_after", ["nothing", "the shard's rename", "the shard", "one part", "all"])
def test_a_join_repeated_after_an_interruption_gives_the_same_shard(broken_off_after: str, parts_dir: Path) -> None:
    parts, shard = written(parts_dir, [0, 1], [2], [3, 4]), parts_dir.parent / "samples-000000000000.parquet"
    kept = {path: path.read_bytes() for path in parts}
    join_parts(parts, shard, 1)
    whole = shard.read_bytes()
    if broken_off_after == "nothing":
        shard.unlink()
    if broken_off_after in ("nothing", "the shard's rename"):
        (parts_dir / f"{shard.name}.sha256").unlink()
    for path in {"one part": parts[1:], "all": []}.get(broken_off_after, parts):
        path.write_bytes(kept[path])
    join_parts(parts, shard, 1)
    assert shard.read_bytes() == whole and not list(parts_dir.glob("*.parquet"))
    assert find_parts(parts_dir.parent, "samples", 1)[1].keys() == {0, 1, 2, 3, 4}
    assert pq.read_table(shard).equals(rows([0, 1, 2, 3, 4]))


def test_a_shard_does_not_depend_on_its_parts(parts_dir: Path) -> None:
    made = []
    for number, groups in enumerate([([0, 1], [2, 3]), ([0], [1, 2], [3])]):
        join_parts(written(parts_dir, *groups), parts_dir.parent / f"{number}.parquet", 1)
        made.append((parts_dir.parent / f"{number}.parquet").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("groups", [([0, 1],), ([0], [1])])
def test_a_shard_equals_a_file_written_in_one_piece(groups: tuple[list[int], ...], parts_dir: Path) -> None:
    join_parts(written(parts_dir, *groups), parts_dir.parent / "samples-0.parquet", 1)
    write_table(rows([0, 1]), parts_dir.parent / "whole.parquet")
    assert (parts_dir.parent / "samples-0.parquet").read_bytes() == (parts_dir.parent / "whole.parquet").read_bytes()


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("damaged", ["a shard", "a shard of one part", "the SHA-256 of a shard", "a part"])
def test_fault_51_a_bit_flip_in_a_file_of_an_interrupted_step_only_loses_its_rows(
    damaged: str, parts_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = parts_dir.parent
    shards = [folder / f"samples-{first:012d}.parquet" for first in (0, 2)]
    join_parts(written(parts_dir, [0], [1]), shards[0], 1)
    join_parts(written(parts_dir, [2]), shards[1], 1)
    (part,) = written(parts_dir, [3, 4])
    path, lost = {
        "a shard": (shards[0], {0, 1}),
        "a shard of one part": (shards[1], {2}),
        "the SHA-256 of a shard": (parts_dir / f"{shards[0].name}.sha256", {0, 1}),
        "a part": (part, {3, 4}),
    }[damaged]
    whole = {file: file.read_bytes() for file in (*shards, part, *parts_dir.glob("*.sha256"))}
    num_bits = 8 * len(whole[path])
    for bit in range(0, num_bits, num_bits // 60):
        flip(path, bit)
        caplog.clear()
        found, held = find_parts(folder, "samples", 1)
        assert held.keys() == {0, 1, 2, 3, 4} - lost == {index for one in found for index in indices(one.path)}
        assert [record.message for record in caplog.records] == [
            f"{folder}: 1 of 3 files of the interrupted attempt are damaged, the first"
            f" {path.name.removesuffix('.sha256')}; their rows are regenerated"
        ]
        for file, content in whole.items():
            file.write_bytes(content)
    assert find_parts(folder, "samples", 1)[1].keys() == {0, 1, 2, 3, 4}


def indices(path: Path) -> list[int]:
    found: list[int] = pq.read_table(path)["prompt_index"].to_pylist()
    return found


def test_fault_51_remaining_parts_of_a_damaged_shard_are_used(parts_dir: Path) -> None:
    parts, shard = written(parts_dir, [0, 1], [2]), parts_dir.parent / "samples-000000000000.parquet"
    kept = {path: path.read_bytes() for path in parts}
    join_parts(parts, shard, 1)
    for path, content in kept.items():
        path.write_bytes(content)
    flip(shard, 1000)
    found, held = find_parts(parts_dir.parent, "samples", 1)
    assert held.keys() == {0, 1, 2} and not any(part.is_shard for part in found)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_fault_51_an_altered_part_is_not_joined(num_parts: int, parts_dir: Path) -> None:
    parts = written(parts_dir, *([index] for index in range(num_parts)))
    flip(parts[-1], 800)
    shard = parts_dir.parent / "samples-000000000000.parquet"
    with pytest.raises(
        StoreError, match=rf"{parts[-1].name}: was altered .*run the same command again to regenerate it"
    ):
        join_parts(parts, shard, 1)
    assert not shard.exists()


def test_fault_51_a_prompt_whose_quarantine_file_is_damaged_is_retried(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for index in (3, 7):
        write_quarantined(tmp_path, index, {"prompt_index": index, "reason": "broken"})
    path = next((tmp_path / "set_aside").glob("*7-*"))
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flip(path, bit)
        assert [entry["prompt_index"] for entry in read_quarantined(tmp_path)] == [3]
        path.write_bytes(whole)
    assert f"{path}: was altered (its SHA-256 differs); its prompt is retried" in caplog.text


def test_a_prompt_that_was_quarantined_twice_counts_once(tmp_path: Path) -> None:
    for reason in ("one", "other"):
        write_quarantined(tmp_path, 7, {"prompt_index": 7, "reason": reason})
    assert len(read_quarantined(tmp_path)) == 1


@pytest.mark.parametrize(
    ("sizes", "shards", "expected"),
    [
        ([1, 1, 1], [], [[0, 1, 2]]),
        ([4, 4, 4, 4], [], [[0, 1, 2], [3]]),
        ([12, 3, 20, 1], [], [[0], [1, 2], [3]]),
        ([4, 12, 4, 9], [1], [[0], [2, 3]]),  # parts on different sides of a shard are not joined
        ([12], [0], []),
        ([], [], []),
    ],
)
def test_consecutive_parts_are_joined_until_a_shard_is_large_enough(
    sizes: list[int], shards: list[int], expected: list[list[int]]
) -> None:
    parts = [
        Part(first=first, num_rows=1, num_bytes=size, path=Path(), is_shard=first in shards)
        for first, size in enumerate(sizes)
    ]
    assert [[part.first for part in group] for group in shards_of(parts, 10)] == expected


def images(prompt: int, indices: Sequence[int]) -> pa.Table:
    """Row of a prompt with these images; all of them: as a call for whole prompts makes it."""
    values = np.array([[[prompt, image] for image in indices]], np.float32)
    row = rows([prompt]).append_column("latents", tensor_column(values))
    row = row.append_column("prompt_embedding", tensor_column(np.full((1, 2, 3), prompt, np.float16)))
    row = row.append_column("score_clip", list_column([prompt + image / 10 for image in indices], len(indices), FLOAT))
    row = row.append_column("images", list_column([b"%d" % image for image in indices], len(indices), pa.binary()))
    return row.append_column("diversity", pa.array([None], FLOAT))


def piece(prompt: int, start: int, stop: int) -> pa.Table:
    row = images(prompt, range(start, stop)).append_column("image_start", pa.array([start], pa.int64()))
    return row.append_column("image_stop", pa.array([stop], pa.int64()))


FLOAT = pa.float64()
NUM_IMAGES = 5
PIECES = [(prompt, start, stop) for prompt in (0, 1, 2) for start, stop in ((0, 2), (2, 4), (4, 5))]


def test_pieces_of_prompts_in_any_order_of_writing_give_the_shard_of_whole_prompts(parts_dir: Path) -> None:
    for prompt, start, stop in random.Random(0).sample(PIECES, len(PIECES)):
        write_part(piece(prompt, start, stop), parts_dir=parts_dir)
    found, held = find_parts(parts_dir.parent, "samples", NUM_IMAGES)
    assert [(part.first, part.image_start, part.num_images) for part in found] == [
        (prompt, start, stop - start) for prompt, start, stop in PIECES
    ]
    assert held == {prompt: {0, 1, 2, 3, 4} for prompt in (0, 1, 2)}
    (group,) = shards_of(found, 10**9)
    shard, whole = parts_dir.parent / "samples-000000000000.parquet", parts_dir.parent / "whole.parquet"
    join_parts([part.path for part in group], shard, NUM_IMAGES, complete)
    for prompt in (0, 1, 2):
        write_part(complete(images(prompt, range(NUM_IMAGES))), parts_dir=parts_dir)
    join_parts(sorted(parts_dir.glob("*.parquet")), whole, NUM_IMAGES)
    assert shard.read_bytes() == whole.read_bytes()
    assert not [*parts_dir.glob("*.parquet")]


def complete(row: pa.Table) -> pa.Table:
    value = pa.array([float(len(row["images"][0]))], FLOAT)
    return row.set_column(row.column_names.index("diversity"), "diversity", value)


def test_a_prompt_with_a_missing_piece_is_left_out_of_its_shard(parts_dir: Path) -> None:
    for prompt, start, stop in PIECES:
        if (prompt, start) != (1, 2):
            write_part(piece(prompt, start, stop), parts_dir=parts_dir)
    found, held = find_parts(parts_dir.parent, "samples", NUM_IMAGES)
    assert held[1] == {0, 1, 4}
    join_parts([part.path for part in found], shard := parts_dir.parent / "samples-0.parquet", NUM_IMAGES)
    assert indices(shard) == [0, 2]


def test_a_prompt_whose_images_exceed_a_row_is_refused_at_its_first_piece_and_when_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = Part(first=0, num_rows=1, num_bytes=20 * 2**20, num_images=4, path=Path())
    refuse_large_rows(large, 400)
    with pytest.raises(GenerationError, match=r"the images of a prompt take 2\.4 GiB, .* lower the number or the size"):
        refuse_large_rows(large, 500)
    monkeypatch.setattr("cdpo_ray.dataflow.parts.MAX_ROW_BYTES", 10)
    with pytest.raises(GenerationError, match=r"must hold less than 2 GiB"):
        whole_prompts([piece(0, 0, 2), piece(0, 2, 4), piece(0, 4, 5)], NUM_IMAGES)


def test_a_piece_that_overlaps_another_is_deleted(parts_dir: Path) -> None:
    for start, stop in ((0, 2), (2, 4), (1, 3)):  # as after a change of the batch size by hand
        write_part(piece(7, start, stop), parts_dir=parts_dir)
    found, held = find_parts(parts_dir.parent, "samples", NUM_IMAGES)
    assert len(found) == 2 and len([*parts_dir.glob("*.parquet")]) == 2
    assert held == {7: {image for part in found for image in range(part.image_start, part.image_start + 2)}}


def test_the_pieces_of_a_prompt_are_never_in_different_shards() -> None:
    parts = [
        Part(first=prompt, image_start=start, num_rows=1, num_bytes=8, path=Path(), num_images=stop - start)
        for prompt, start, stop in PIECES
    ]
    groups = [[(part.first, part.image_start) for part in group] for group in shards_of(parts, 10)]
    assert groups == [[(prompt, start) for start in (0, 2, 4)] for prompt in (0, 1, 2)]


def test_parts_come_in_order_as_soon_as_all_before_them_are_finished() -> None:
    made = [Part(first=first, num_rows=1, num_bytes=1, path=Path()) for first in range(6)]
    taken: list[int] = []

    def finished() -> Iterator[Part]:
        for first in (2, 0, 1, 5, 4):  # 3 is quarantined
            taken.append(first)
            yield made[first]

    found = [(part.first, len(taken)) for part in in_order(finished(), [(first, 0) for first in range(6)])]
    assert found == [(0, 2), (1, 3), (2, 3), (4, 5), (5, 5)]


def test_quarantine_files_are_joined_once_and_can_still_be_read(tmp_path: Path) -> None:
    assert join_quarantined(tmp_path) == [] and not list(tmp_path.iterdir())
    (tmp_path / "set_aside").mkdir()
    (tmp_path / "set_aside" / "000000000007.jsonl").write_text('{"prompt_index": 7}\n')
    (tmp_path / "set_aside.jsonl").write_text('{"prompt_index": 3}\n{"prompt_index": 7}\n')
    expected = [{"prompt_index": 3}, {"prompt_index": 7}]
    assert join_quarantined(tmp_path) == expected == read_quarantined(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set_aside.jsonl"]

"""Joining the parts of an evaluation: every image once, in order, with bounded memory."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray.dataflow.parts import Part, find_parts, write_part
from cdpo_ray.errors import StoreError
from cdpo_ray.evaluation.joining import join_comparison
from cdpo_ray.store import PARTS

NUM_IMAGES, PROMPTS_PER_PART = 3, 2
IMAGE_BYTES = 100_000


def image(prompt: int, sample: int, arm: int, num_bytes: int) -> bytes:
    return np.random.default_rng([prompt, sample, arm]).bytes(num_bytes)


def write(folder: Path, num_parts: int, num_bytes: int) -> list[Part]:
    (folder / PARTS).mkdir(parents=True)
    for first in range(0, num_parts * PROMPTS_PER_PART, PROMPTS_PER_PART):
        prompts = range(first, first + PROMPTS_PER_PART)
        rows = {"prompt_index": list(prompts), "prompt_id": [f"id {prompt}" for prompt in prompts]}
        rows["prompt"] = [f"prompt {prompt}" for prompt in prompts]
        for arm, name in enumerate(("base", "tuned")):
            samples = range(NUM_IMAGES)
            rows[f"{name}_image"] = [[image(prompt, one, arm, num_bytes) for one in samples] for prompt in prompts]
            rows[f"{name}_score_clip"] = [[prompt + one / 10 + arm / 100 for one in samples] for prompt in prompts]
            rows[f"{name}_diversity"] = [0.5 + arm] * len(prompts)
        write_part(pa.table(rows), parts_dir=folder / PARTS)
    return find_parts(folder, "comparison", NUM_IMAGES)[0]


@pytest.mark.parametrize("row_group_bytes", [1, 200, 10**9])
def test_the_file_has_every_image_in_order_for_any_row_group_size(row_group_bytes: int, tmp_path: Path) -> None:
    parts = write(tmp_path, 4, 50)
    kept = join_comparison(parts, tmp_path / "comparison.parquet", {}, NUM_IMAGES, row_group_bytes=row_group_bytes)
    expected = [
        {
            "prompt_index": prompt,
            "prompt_id": f"id {prompt}",
            "prompt": f"prompt {prompt}",
            "sample_index": sample,
            "base_image": image(prompt, sample, 0, 50),
            "base_score_clip": prompt + sample / 10,
            "tuned_image": image(prompt, sample, 1, 50),
            "tuned_score_clip": prompt + sample / 10 + 1 / 100,
        }
        for prompt in range(4 * PROMPTS_PER_PART)
        for sample in range(NUM_IMAGES)
    ]
    with pq.ParquetFile(tmp_path / "comparison.parquet") as file:
        assert file.num_row_groups == (1 if row_group_bytes == 10**9 else 4)
        joined = file.read()
    assert joined.to_pylist() == expected and list(joined.column_names) == list(expected[0])
    assert kept["prompt_index"].to_pylist() == list(range(4 * PROMPTS_PER_PART))
    assert [name for name in kept.column_names if "image" in name] == []
    assert kept["tuned_diversity"].to_pylist() == [1.5] * 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.parquet", PARTS]


def test_an_unreadable_part_leaves_the_existing_file_unchanged(tmp_path: Path) -> None:
    parts, path = write(tmp_path, 2, 50), tmp_path / "comparison.parquet"
    join_comparison(parts, path, {}, NUM_IMAGES)
    before = path.read_bytes()
    parts[1].path.write_bytes(b"cut off")
    with pytest.raises(StoreError, match=rf"{parts[1].path.name}: was altered"):
        join_comparison(parts, path, {}, NUM_IMAGES, row_group_bytes=1)
    assert path.read_bytes() == before


def peak_of_joining(parts: list[Part], path: Path) -> int:
    """Peak of Arrow's memory in this process, in bytes."""
    join_comparison(parts, path, {}, NUM_IMAGES, row_group_bytes=2 * parts[0].num_bytes)
    peak: int = pa.default_memory_pool().max_memory()
    return peak


def test_memory_does_not_grow_with_the_number_of_parts(tmp_path: Path) -> None:
    peaks = {}
    for num_parts in (3, 30):
        parts = write(tmp_path / str(num_parts), num_parts, IMAGE_BYTES)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # an empty memory pool
            peaks[num_parts] = process.submit(peak_of_joining, parts, tmp_path / f"{num_parts}.parquet").result()
    all_images = 30 * PROMPTS_PER_PART * NUM_IMAGES * 2 * IMAGE_BYTES
    assert peaks[30] < 1.3 * peaks[3] and peaks[30] < all_images / 3, peaks


def test_categories_are_added_to_the_rows_of_prompts_and_of_images(tmp_path: Path) -> None:
    parts, path = write(tmp_path, 2, 50), tmp_path / "comparison.parquet"
    rows = join_comparison(parts, path, {"prompt 0": "one", "prompt 3": "two", "other": "three"}, NUM_IMAGES)
    assert rows["category"].to_pylist() == ["one", None, None, "two"]
    categories = pq.read_table(path, columns=["category"])["category"].to_pylist()
    assert categories == [each for each in ("one", None, None, "two") for _ in range(NUM_IMAGES)]
    assert "category" not in join_comparison(parts, path, {}, NUM_IMAGES).column_names
    assert "category" not in pq.read_schema(path).names

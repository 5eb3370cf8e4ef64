"""Rows with pixels: unusable ones are quarantined by name, and results do not depend on the rows per table."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from preference_sets import encoded, judged_scenes, pickapic_rows, write_parquet

from cdpo_ray.preferences.files import scan
from cdpo_ray.preferences.images import Frame
from cdpo_ray.preferences.pixels import faults_of, read_chunks
from cdpo_ray.preferences.rows import PreferenceSource

FRAME = Frame(32, 32, max_bytes=100_000, max_pixels=1_000_000)


def chunk_rows(source: PreferenceSource) -> pa.Table:
    return pa.Table.from_pylist([asdict(chunk) for chunk in scan(source).chunks])


def read(source: PreferenceSource, folder: Path, *, num_samples: int = 2, rows_per_table: int = 5) -> pa.Table:
    folder.mkdir(exist_ok=True)
    tables = read_chunks(
        chunk_rows(source),
        source=source,
        frame=FRAME,
        num_samples=num_samples,
        rows_per_table=rows_per_table,
        quarantine_dir=folder,
    )
    return pa.concat_tables(tables)


def set_aside(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def broken_set(folder: Path) -> PreferenceSource:
    rows = pickapic_rows(20)
    rows[2]["jpg_1"] = b""
    rows[9]["jpg_0"] = rows[9]["jpg_0"][:60]
    rows[13] |= {"jpg_0": b"text", "jpg_1": None}
    rows[15] |= {"label_0": 0.5, "label_1": 0.5, "jpg_0": b"not read"}
    return PreferenceSource(str(write_parquet(rows, folder / "set.parquet")), "pickapic")


def test_pixels_labels_and_scores_equal_those_of_the_file(tmp_path: Path) -> None:
    source = PreferenceSource(str(write_parquet(pickapic_rows(12), tmp_path / "set.parquet")), "pickapic")
    table = read(source, tmp_path / "aside")
    assert table["prompt_index"].to_pylist() == list(range(12))
    pixels = table["pixels"].combine_chunks().to_numpy_ndarray()
    for place, judged in enumerate(judged_scenes(12)):
        first = place % 2 == 0
        np.testing.assert_array_equal(
            pixels[place], [judged.right, judged.wrong] if first else [judged.wrong, judged.right]
        )
        assert table["prompt"][place].as_py() == judged.prompt
        assert (
            table["score_label"][place].as_py()
            == table["score_preference"][place].as_py()
            == [float(first), float(not first)]
        )


def test_unusable_rows_and_images_are_quarantined_with_file_row_and_reason(tmp_path: Path) -> None:
    source = broken_set(tmp_path)
    table = read(source, tmp_path / "aside")
    assert table["prompt_index"].to_pylist() == [index for index in range(20) if index not in (2, 9, 13, 15)]
    reasons = [(fault["number"], fault["reason"]) for fault in set_aside(tmp_path / "aside")]
    assert reasons[0] == (3, "image 1 is empty")
    assert reasons[1][0] == 10
    assert reasons[1][1].startswith("image 0 is ")
    assert reasons[2:] == [(14, "`jpg_1` must be an image's bytes or its path, got NoneType")]
    assert {fault["file"] for fault in set_aside(tmp_path / "aside")} == {source.path}


def test_results_depend_neither_on_the_rows_per_table_nor_on_the_number_of_reads(tmp_path: Path) -> None:
    source = broken_set(tmp_path)
    whole = read(source, tmp_path / "aside", rows_per_table=100)
    before = set_aside(tmp_path / "aside")
    for size in (1, 3, 8):
        assert read(source, tmp_path / "aside", rows_per_table=size).equals(whole)
    assert set_aside(tmp_path / "aside") == before


def test_checking_reports_the_faults_that_importing_quarantines(tmp_path: Path) -> None:
    source = broken_set(tmp_path)
    read(source, tmp_path / "aside")
    reported = faults_of(chunk_rows(source), source=source, frame=FRAME)["fault"].to_pylist()
    assert reported == [
        f"{fault['file']}:{fault['number']}: {fault['reason']}" for fault in set_aside(tmp_path / "aside")
    ]


def test_a_ranked_folder_keeps_usable_images_and_short_ones_are_padded(tmp_path: Path) -> None:
    judged = list(judged_scenes(3))
    for name, images in {
        "a": [encoded(judged[0].right), b"no image", encoded(judged[0].wrong), encoded(judged[1].wrong)],
        "b": [encoded(judged[1].right), encoded(judged[1].wrong)],
        "c": [encoded(judged[2].right), b""],
    }.items():
        (tmp_path / "ranked" / name).mkdir(parents=True)
        (tmp_path / "ranked" / name / "prompt.txt").write_text(name)
        for rank, image in enumerate(images):
            (tmp_path / "ranked" / name / f"{rank}.png").write_bytes(image)
    source = PreferenceSource(str(tmp_path / "ranked"), "ranked_folders")
    table = read(source, tmp_path / "aside", num_samples=4)
    assert table["prompt"].to_pylist() == ["a", "b"]
    np.testing.assert_array_equal(table["score_preference"].to_pylist(), [[0, np.nan, -2, -3], [0, -1, np.nan, np.nan]])
    pixels = table["pixels"].combine_chunks().to_numpy_ndarray()
    np.testing.assert_array_equal(pixels[0, 2], judged[0].wrong)
    assert not pixels[1, 2:].any()
    assert [Path(fault["file"]).name for fault in set_aside(tmp_path / "aside")] == ["a", "c"]

"""Column layouts of published sets: each gives the prompts, images and order of preference of its annotators."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preference_sets import encoded, judged_scenes

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.files import fingerprint, read_rows, scan
from cdpo_ray.preferences.images import Frame
from cdpo_ray.preferences.pixels import faults_of, read_chunks
from cdpo_ray.preferences.rows import Fault, PreferenceSource, Row

BYTES = [f"\x89image {number}".encode("latin1") for number in range(9)]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path, layout: str, **given: Any) -> list[Row | Fault]:
    source = PreferenceSource(str(path), layout, **given)
    return [row for chunk in scan(source).chunks for row in read_rows(chunk, source)]


def row_in(path: Path, layout: str, **given: Any) -> Row:
    (row,) = read(path, layout, **given)
    assert isinstance(row, Row), row
    return row


def test_a_winner_column_gives_the_labels_ties_and_unlabelled_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a cat", "image_a": "a.png", "image_b": "b.png", "winner": who} for who in ("b", "tie", None, "c")
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = scan(PreferenceSource(str(path), "winner"))
    assert (len(found.prompts), found.num_tied, found.num_unlabelled) == (1, 1, 1)
    assert [fault.reason for fault in found.faults] == ["`winner` must be one of a, b, or tie, got 'c'"]
    row = read(path, "winner")[0]
    assert isinstance(row, Row) and row.labels == (0, 1)
    mine = [{"prompt": "a cat", "image1": "a.png", "image2": "b.png", "preferred": 1.0}]
    columns = {"image_a": "image1", "image_b": "image2", "winner": "preferred"}
    assert row_in(jsonl(tmp_path / "b.jsonl", mine), "winner", columns=columns).labels == (1, 0)


@pytest.mark.parametrize("name", ["image_path", "file_path"])
def test_hpdv2_is_read_by_preferences_and_by_ranks_of_more_than_two_images(tmp_path: Path, name: str) -> None:
    train = [{"prompt": "a cat", name: ["a.png", "b.png"], "human_preference": [0, 1]}]
    row = row_in(jsonl(tmp_path / "train.jsonl", train), "hpdv2")
    assert (row.images, row.labels) == ((f"{tmp_path}/a.png", f"{tmp_path}/b.png"), (0, 1))
    test = [{"prompt": "a cat", name: ["a.png", "b.png", "c.png"], "rank": [2, 3, 1], "raw_annotations": []}]
    path = jsonl(tmp_path / "test.jsonl", test)
    assert row_in(path, "hpdv2").labels == (-2, -3, -1)
    assert row_in(path, "hpdv2", difficulty="rank").scores == (-2, -3, -1)
    assert scan(PreferenceSource(str(path), "hpdv2")).num_samples == 3
    files = [tmp_path / f"{letter}.png" for letter in "abc"]
    for file in files:
        file.write_bytes(b"\x89PNG")
    before = fingerprint(PreferenceSource(str(path), "hpdv2"))
    files[2].write_bytes(b"\x89PNH")
    assert fingerprint(PreferenceSource(str(path), "hpdv2")) != before


def test_the_first_path_of_hpdv3_is_preferred(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a cat", "path1": "images/a.jpg", "path2": "images/b.jpg", "confidence": 0.9, "choice_dist": None}
    ]
    row = row_in(jsonl(tmp_path / "train.jsonl", rows), "hpdv3")
    assert (row.images, row.labels) == ((f"{tmp_path}/images/a.jpg", f"{tmp_path}/images/b.jpg"), (1, 0))


@pytest.mark.parametrize("kind", [pa.binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])])
def test_lists_of_images_with_ratings_are_read_without_reading_the_images_first(
    tmp_path: Path, kind: pa.DataType
) -> None:
    images = [[BYTES[0], BYTES[1], BYTES[2]], [BYTES[3], BYTES[4]], [BYTES[5], None], [BYTES[6]]]
    if pa.types.is_struct(kind):
        images = [[image and {"bytes": image, "path": None} for image in row] for row in images]
    table = {"prompt": ["a", "b", "c", "d"], "ratings": [[0.5, 2, 1], [1, 1], [1, 0], [1, 0]]}
    schema = pa.schema([("prompt", pa.string()), ("images", pa.list_(kind)), ("ratings", pa.list_(pa.float64()))])
    pq.write_table(pa.table(table | {"images": images}, schema), tmp_path / "a.parquet")
    source = PreferenceSource(str(tmp_path / "a.parquet"), "image_list")
    first, *others = read(tmp_path / "a.parquet", "image_list")
    assert isinstance(first, Row)
    assert (first.images, first.labels) == ((*BYTES[:3],), (0.5, 2, 1))
    assert [fault.reason for fault in others if isinstance(fault, Fault)] == [
        "`images[1]` must be an image's bytes or its path, got NoneType",
        "must have as many labels and scores as images, got 2 labels, 2 scores and 1 images",
    ]
    found = scan(source)
    assert (found.num_tied, len(found.prompts), found.num_samples) == (1, 3, 3)
    assert len(scan(source, with_images=True).faults) == 2
    assert fingerprint(source) == fingerprint(source)


def group_rows(order: list[int], **more: Any) -> list[dict[str, Any]]:
    """Two prompts with three and two images; the image's number is in its name."""
    ranks = {0: ("p", 2), 1: ("p", 1), 2: ("p", 3), 3: ("q", 2), 4: ("q", 1)}
    return [
        {"prompt_id": ranks[number][0], "prompt": f"prompt {ranks[number][0]}", "image": f"{number}.png"}
        | {"rank": ranks[number][1], "overall_rating": 7 - ranks[number][1]}
        | more
        for number in order
    ]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [0, 3, 1, 4, 2], [4, 2, 3, 1, 0]])
@pytest.mark.parametrize("rows_per_group", [1, 2, 5])
def test_images_of_one_prompt_form_one_ranking_in_any_order(
    tmp_path: Path, order: list[int], rows_per_group: int
) -> None:
    pq.write_table(pa.Table.from_pylist(group_rows(order)), tmp_path / "a.parquet", row_group_size=rows_per_group)
    jsonl(tmp_path / "a.jsonl", group_rows(order))
    (tmp_path / "a.json").write_text(json.dumps(group_rows(order)))
    for name in ("a.parquet", "a.jsonl", "a.json"):
        found = {row.prompt: row for row in read(tmp_path / name, "imagerewarddb") if isinstance(row, Row)}
        assert set(found) == {"prompt p", "prompt q"}
        for row in found.values():
            by_image = dict(zip((Path(str(image)).name for image in row.images), row.labels, strict=True))
            expected = (
                {"0.png": -2, "1.png": -1, "2.png": -3} if row.prompt == "prompt p" else {"3.png": -2, "4.png": -1}
            )
            assert by_image == expected
            assert found[row.prompt].number == 1 + min(order.index(int(image[0])) for image in by_image)
        scanned = scan(PreferenceSource(str(tmp_path / name), "imagerewarddb"))
        assert (scanned.num_rows, scanned.num_samples, len(scanned.chunks)) == (2, 3, 1)
        by_score = PreferenceSource(str(tmp_path / name), "imagerewarddb", difficulty="score")
        (chunk,) = scan(by_score).chunks
        scores = {row.prompt: sorted(row.scores) for row in read_rows(chunk, by_score) if isinstance(row, Row)}
        assert scores == {"prompt p": [4, 5, 6], "prompt q": [5, 6]}


def test_a_large_file_must_have_the_rows_of_a_prompt_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdpo_ray.preferences.files.MAX_HELD_BYTES", 10)
    together = read(jsonl(tmp_path / "a.jsonl", group_rows([0, 1, 2, 3, 4])), "imagerewarddb")
    assert [row.prompt for row in together if isinstance(row, Row)] == ["prompt p", "prompt q"]
    apart = read(jsonl(tmp_path / "b.jsonl", group_rows([0, 1, 3, 4, 2])), "imagerewarddb")
    assert [row.prompt for row in apart if isinstance(row, Row)] == ["prompt p", "prompt q"]
    assert [(row.number, row.reason) for row in apart if isinstance(row, Fault)] == [
        (5, "`prompt_id` 'p' has other rows before; sort the file by it, or split it")
    ]


@pytest.mark.parametrize("max_held_bytes", [2**20, 10])
def test_each_row_that_cannot_be_read_is_one_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_held_bytes: int
) -> None:
    monkeypatch.setattr("cdpo_ray.preferences.files.MAX_HELD_BYTES", max_held_bytes)
    path = jsonl(tmp_path / "a.jsonl", group_rows([0, 1, 2]))
    with path.open("a") as lines:
        lines.write("{\n" * 3)
    found = scan(PreferenceSource(str(path), "imagerewarddb"))
    assert ([fault.number for fault in found.faults], found.num_rows) == ([4, 5, 6], 4)


def test_rankings_with_bad_rows_are_faults_and_the_others_are_read(tmp_path: Path) -> None:
    good = group_rows([3, 4])
    rows: list[Any] = [
        *group_rows([0], prompt_id="alone"),
        *group_rows([0, 1], prompt_id=None),
        *[row | {"prompt_id": "two prompts"} for row in group_rows([0, 3])],
        *[row | {"prompt_id": "null", "rank": None if row["rank"] == 1 else 2} for row in group_rows([0, 1])],
        "not an object",
        *[row | {"prompt_id": "tied", "rank": 1} for row in group_rows([0, 1])],
        *good,
    ]
    found = scan(PreferenceSource(str(jsonl(tmp_path / "a.jsonl", rows)), "imagerewarddb"))
    assert [(fault.number, fault.reason) for fault in found.faults] == [
        (1, "must have at least 2 images, got 1"),
        (2, "`prompt_id` must not be null"),
        (4, "`prompt` must be the same in all rows of `prompt_id` 'two prompts'"),
        (6, "`rank[1]` must be a number, got None"),
        (8, "must be an object, got str"),
    ]
    assert (found.prompts, found.num_tied) == (["prompt q"], 1)


def test_the_published_metadata_of_imagerewarddb_names_images_by_path(tmp_path: Path) -> None:
    rows = [{name.replace("image", "image_path"): value for name, value in row.items()} for row in group_rows([3, 4])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata-train.parquet")
    assert row_in(tmp_path, "imagerewarddb").images == (f"{tmp_path}/3.png", f"{tmp_path}/4.png")
    missing = scan(PreferenceSource(str(tmp_path), "imagerewarddb"), with_images=True).faults
    assert [fault.reason for fault in missing] == [f"{tmp_path}/3.png: no such file"]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_of_an_imagefolder_names_the_files_of_columns(tmp_path: Path, name: str) -> None:
    row = {"prompt": "a cat", "chosen_file_name": "a.png", "rejected_file_name": "b.png"}
    if name.endswith("csv"):
        (tmp_path / name).write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    else:
        jsonl(tmp_path / name, [row])
    for letter in "ab":
        (tmp_path / f"{letter}.png").write_bytes(b"\x89PNG")
    assert row_in(tmp_path, "pairs").images == (f"{tmp_path}/a.png", f"{tmp_path}/b.png")
    before = fingerprint(PreferenceSource(str(tmp_path), "pairs"))
    (tmp_path / "b.png").write_bytes(b"\x89PNH")
    assert fingerprint(PreferenceSource(str(tmp_path), "pairs")) != before


def test_votes_of_rapidata_are_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "image1": "a.png", "image2": "b.png", "votes_image1": 8, "votes_image2": 18}]
    columns = {"caption": "prompt", "jpg_0": "image1", "jpg_1": "image2"}
    columns |= {"label_0": "votes_image1", "label_1": "votes_image2"}
    assert row_in(jsonl(tmp_path / "a.jsonl", rows), "pickapic", columns=columns).labels == (8, 18)


def test_a_renamed_column_must_be_there_under_its_new_name(tmp_path: Path) -> None:
    rows = [{"prompt": "a cat", "file_path": ["a.png", "b.png"], "human_preference": [1, 0]}]
    with pytest.raises(PreferenceError, match="has no column 'images', got 'prompt', 'file_path', 'human_preference'"):
        read(jsonl(tmp_path / "a.jsonl", rows), "hpdv2", columns={"image_path": "images"})


def test_rankings_are_padded_and_their_unusable_images_set_aside(tmp_path: Path) -> None:
    scenes = [encoded(scene.right) for scene in judged_scenes(3)]
    rows = group_rows([0, 1, 2, 3, 4])
    for row, image in zip(rows, [scenes[0], scenes[1], b"no image", scenes[2], scenes[0]], strict=True):
        row["image"] = {"bytes": image, "path": None}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    source = PreferenceSource(str(tmp_path / "a.parquet"), "imagerewarddb")
    scanned, frame = scan(source, with_images=True), Frame(32, 32, max_bytes=100_000, max_pixels=1_000_000)
    chunks = pa.Table.from_pylist(list(map(asdict, scanned.chunks)))
    (tmp_path / "aside").mkdir()
    tables = read_chunks(
        chunks,
        source=source,
        frame=frame,
        num_samples=scanned.num_samples,
        rows_per_table=4,
        quarantine_dir=tmp_path / "aside",
    )
    table = pa.concat_tables(tables)
    assert table["prompt_index"].to_pylist() == [0, 3]
    np.testing.assert_array_equal(table["score_label"].to_pylist(), [[-2, -1, np.nan], [-2, -1, np.nan]])
    (fault,) = faults_of(chunks, source=source, frame=frame)["fault"].to_pylist()
    assert fault.startswith(f"{tmp_path}/a.parquet:1: image 2 must be one of PNG")

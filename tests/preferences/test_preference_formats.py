"""Columns of formats, and errors for files of other kinds and formats."""

import json
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray.config import PreferenceFormat
from cdpo_ray.config.data import PreferencesSection
from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.files import scan
from cdpo_ray.preferences.formats import FORMATS
from cdpo_ray.preferences.rows import PreferenceSource

PAIR = {"prompt": "a cat, asleep", "chosen": "a.png", "rejected": "b.png"}


def refused(path: Path, format_name: str = "pairs") -> str:
    source = PreferenceSource(str(path), format_name)
    with pytest.raises(PreferenceError) as caught:
        scan(source).refuse_unusable(source, 1.0)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


def test_files_of_other_kinds_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("3")
    assert refused(tmp_path / "a.json").endswith(
        "must have a row with a preference, got 1 rows: 0 with a preference, 0 tied, 0 unlabelled, 1 cannot be read"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps([PAIR] * 3))
    assert refused(tmp_path / "a.jsonl").endswith("is a JSON list, not one object per line; rename it to end in .json")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "00000.zip").touch()
    assert f"{shards}/00000.zip: is an archive; unpack it, and give the table that names its images" in refused(shards)
    (tmp_path / "my set.parquet.gz").touch()
    assert refused(tmp_path / "my set.parquet.gz").endswith("decompress it: gunzip 'my set.parquet.gz'")
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.PNG", "LICENSE"):
        (images / name).touch()
    assert refused(images).endswith("(.tar and text also with .gz), got 2 .png, 1 without extension")
    (images / "one").mkdir()
    (images / "one" / "prompt.txt").touch()
    assert refused(images).endswith("holds one folder per prompt; set `preferences.format` to ranked_folders")


def test_a_folder_of_one_prompt_and_a_file_are_refused_as_ranked_folders(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "prompt.txt").touch()
    (tmp_path / "a.parquet").touch()
    message = refused(tmp_path / "one", "ranked_folders")
    assert message == f"{tmp_path}/one: is the folder of one prompt; give the folder that holds it, {tmp_path}"
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").touch()
    assert "tables: holds no folders, got a.csv; " in refused(tmp_path / "tables", "ranked_folders")
    assert "is a file, but `preferences.format` ranked_folders needs a folder" in refused(
        tmp_path / "a.parquet", "ranked_folders"
    )


@pytest.mark.parametrize("url", ["https://host/a.parquet", "s3://bucket/set", "hf://datasets/a/b"])
@pytest.mark.parametrize("format_name", ["pairs", "ranked_folders"])
def test_a_url_is_refused(url: str, format_name: str) -> None:
    with pytest.raises(PreferenceError, match="is a URL; download the files, and give their folder"):
        scan(PreferenceSource(url, format_name))


def test_missing_columns_are_reported_with_the_fitting_format_or_the_columns_of_the_file(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "a.parquet")
    assert refused(tmp_path, "pickapic").endswith(
        "has no column 'caption', 'label_0', 'label_1', 'jpg_0', 'jpg_1', got 'prompt', 'chosen', 'rejected'; they fit"
        " `preferences.format` pairs"
    )
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a cat", "image_path": ["a.png", "b.png"]}))
    assert refused(tmp_path).endswith(
        "a.jsonl: has no column 'chosen', 'rejected', got 'prompt', 'image_path'; give their names in"
        " `preferences.columns`, or set `preferences.format` to hpdv2, which has prompt, image_path, human_preference"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({f"\x1b{number}" + "x" * 500: 1 for number in range(500)}))
    message = refused(tmp_path)
    assert "'\\x1b0xxx" in message and "... (500 in total); give their names in `preferences.columns`" in message


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "ranked_folders"])
def test_columns_of_each_format_are_recognised_as_its(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(FORMATS[name].required, "x")))
    other = "pairs" if name != "pairs" else "pickapic"
    assert refused(tmp_path, other).endswith(f"; they fit `preferences.format` {name}")


def test_the_config_names_the_formats_and_those_with_more_than_two_images() -> None:
    assert get_args(PreferenceFormat) == tuple(FORMATS)
    of_lists = [name for name, columns in FORMATS.items() if len(columns.images) == 1]
    assert of_lists == [name for name in FORMATS if not PreferencesSection(path="x", format=name).has_pairs_only]


@pytest.mark.parametrize("name", FORMATS)
def test_a_difficulty_without_columns_is_refused(name: str) -> None:
    for difficulty, columns in {"score": FORMATS[name].scores, "rank": FORMATS[name].ranks}.items():
        source = PreferenceSource("nowhere", name, difficulty=difficulty)
        expected = "not found" if columns else f"`preferences.format` {name} has no column of {difficulty}s"
        with pytest.raises(PreferenceError, match=expected):
            scan(source)

"""Files of unsupported kinds are refused with their contents and a way to convert them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.files import PreferenceSource, scan

PAIR = {"prompt": "a cat, asleep", "chosen": "a.png", "rejected": "b.png"}


def refused(path: Path, format_name: str = "pairs") -> str:
    with pytest.raises(PreferenceError) as caught:
        scan(PreferenceSource(str(path), format_name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_text_table_is_refused_with_a_command_that_converts_it_to_jsonl(tmp_path: Path, ending: str) -> None:
    separator = "," if ending == "csv" else "\t"
    (tmp_path / f"a.{ending}").write_text(
        f'prompt{separator}chosen{separator}rejected\r\n"a cat"{separator}a.png{separator}b.png\r\n'
    )
    message = refused(tmp_path)
    assert message.startswith(
        f"{tmp_path}/a.{ending}: is a text table with columns 'prompt', 'chosen', 'rejected'; they fit"
        " `preferences.format` pairs; convert it to JSONL: python -c "
    )
    command = shlex.split(message.partition("convert it to JSONL: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert scan(PreferenceSource(str(tmp_path / "a.jsonl"), "pairs")).prompts == ["a cat"]


def test_the_suggested_command_quotes_the_file_name(tmp_path: Path) -> None:
    name = "$(touch ran) `touch ran`'; \"{to} touch ran #.csv"
    (tmp_path / name).write_text("prompt,chosen,rejected\na cat,a.png,b.png\n")
    command = refused(tmp_path).partition("convert it to JSONL: ")[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, env=os.environ | {"PATH": path})
    assert not (tmp_path / "ran").exists() and len(list(tmp_path.glob("*.jsonl"))) == 1


def test_json_that_is_not_jsonl_is_refused_with_its_contents(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a cat", "image_path": ["a", "b"]}] * 3, indent=1))
    assert refused(tmp_path) == (
        f"{tmp_path}/a.json: is a JSON list of objects with 'prompt', 'image_path'; `preferences.format` pairs has"
        " prompt, chosen, rejected; write one object per line: jq -c '.[]' a.json > a.jsonl"
    )
    (tmp_path / "a.json").write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n")
    assert "a.json: must end in .jsonl if it holds one object per line" in refused(tmp_path)
    (tmp_path / "a.json").write_text("3")
    assert "a.json: must hold one object per line and end in .jsonl, got other JSON" in refused(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps([PAIR] * 3))
    assert "a.jsonl: is a JSON list of objects with 'prompt', 'chosen', 'rejected'; they fit" in refused(tmp_path)


def test_other_folders_and_archives_are_refused_with_advice(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"):
        (saved / name).write_text("{}")
    assert f"{saved}: is a `save_to_disk` folder; convert it to Parquet: python -c " in refused(saved)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "00000.tar").touch()
    assert f"{shards}/00000.tar: is an archive; unpack it, and write a JSONL file" in refused(shards)
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.PNG", "LICENSE"):
        (images / name).touch()
    assert refused(images).endswith("must hold .parquet or .jsonl files, got 2 .png, 1 without extension")
    (images / "one").mkdir()
    (images / "one" / "prompt.txt").touch()
    assert refused(images).endswith("holds one folder per prompt; set `preferences.format` to ranked_folders")


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
    rows = [{"prompt": "a cat", "chosen_file_name": "a.png", "rejected_file_name": "b.png"}, {"prompt": "a dog"}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert refused(tmp_path).endswith(
        "a.jsonl: has no column 'chosen', 'rejected', got 'prompt', 'chosen_file_name', 'rejected_file_name'; give"
        " their names in `preferences.columns`"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({f"\x1b{number}" + "x" * 500: 1 for number in range(500)}))
    assert "'\\x1b0xxx" in refused(tmp_path) and "... (500 in total)" in refused(tmp_path)

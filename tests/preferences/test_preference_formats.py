"""Files of another kind are refused with what they hold and how they are made readable."""

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
from cdpo_ray.preferences.files import Source, scan

PAIR = {"prompt": "a cat, asleep", "chosen": "a.png", "rejected": "b.png"}


def refused(path: Path, format_name: str = "pairs") -> str:
    with pytest.raises(PreferenceError) as caught:
        scan(Source(str(path), format_name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_table_of_text_is_refused_with_the_command_that_writes_it_as_jsonl(tmp_path: Path, ending: str) -> None:
    separator = "," if ending == "csv" else "\t"
    (tmp_path / f"a.{ending}").write_text(
        f'prompt{separator}chosen{separator}rejected\r\n"a cat"{separator}a.png{separator}b.png\r\n'
    )
    message = refused(tmp_path)
    assert message.startswith(
        f"{tmp_path}/a.{ending}: is a table of text with the columns 'prompt', 'chosen', 'rejected'; they fit"
        " `preferences.format` pairs; write it as JSONL: python -c "
    )
    command = shlex.split(message.partition("write it as JSONL: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert scan(Source(str(tmp_path / "a.jsonl"), "pairs")).prompts == ["a cat"]


def test_the_name_of_a_file_is_text_in_the_command_that_is_offered(tmp_path: Path) -> None:
    name = "$(touch ran) `touch ran`'; \"{to} touch ran #.csv"
    (tmp_path / name).write_text("prompt,chosen,rejected\na cat,a.png,b.png\n")
    command = refused(tmp_path).partition("write it as JSONL: ")[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, env=os.environ | {"PATH": path})
    assert not (tmp_path / "ran").exists() and len(list(tmp_path.glob("*.jsonl"))) == 1


def test_json_that_is_no_jsonl_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "a cat", "image_path": ["a", "b"]}] * 3, indent=1))
    assert refused(tmp_path) == (
        f"{tmp_path}/a.json: is a JSON list of objects with 'prompt', 'image_path'; `preferences.format` pairs has"
        " prompt, chosen, rejected; write one object a line: jq -c '.[]' a.json > a.jsonl"
    )
    (tmp_path / "a.json").write_text(f"{json.dumps(PAIR)}\n{json.dumps(PAIR)}\n")
    assert "a.json: must end in .jsonl if it holds one object a line" in refused(tmp_path)
    (tmp_path / "a.json").write_text("3")
    assert "a.json: must hold one object a line and end in .jsonl, got other JSON" in refused(tmp_path)
    (tmp_path / "a.jsonl").write_text(json.dumps([PAIR] * 3))
    assert "a.jsonl: is a JSON list of objects with 'prompt', 'chosen', 'rejected'; they fit" in refused(tmp_path)


def test_other_folders_and_archives_are_refused_with_what_to_do(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"):
        (saved / name).write_text("{}")
    assert f"{saved}: is a folder of `save_to_disk`; write it as Parquet: python -c " in refused(saved)
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "00000.tar").touch()
    assert f"{shards}/00000.tar: is an archive; unpack it, and write a JSONL file" in refused(shards)
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.PNG", "LICENSE"):
        (images / name).touch()
    assert refused(images).endswith("holds no .parquet or .jsonl file, but 2 .png, 1 without ending")
    (images / "one").mkdir()
    (images / "one" / "prompt.txt").touch()
    assert refused(images).endswith("holds a folder for each prompt; give `preferences.format` ranked_folders")


@pytest.mark.parametrize("url", ["https://host/a.parquet", "s3://bucket/set", "hf://datasets/a/b"])
@pytest.mark.parametrize("format_name", ["pairs", "ranked_folders"])
def test_a_url_is_named_as_such(url: str, format_name: str) -> None:
    with pytest.raises(PreferenceError, match="is a URL; download the files first, and give their folder"):
        scan(Source(url, format_name))


def test_missing_columns_are_told_by_the_format_that_fits_or_the_columns_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([PAIR]), tmp_path / "a.parquet")
    assert refused(tmp_path, "pickapic").endswith(
        "has no column 'caption', 'label_0', 'label_1', 'jpg_0', 'jpg_1', but 'prompt', 'chosen', 'rejected'; they fit"
        " `preferences.format` pairs"
    )
    (tmp_path / "a.parquet").unlink()
    rows = [{"prompt": "a cat", "chosen_file_name": "a.png", "rejected_file_name": "b.png"}, {"prompt": "a dog"}]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert refused(tmp_path).endswith(
        "a.jsonl: has no column 'chosen', 'rejected', but 'prompt', 'chosen_file_name', 'rejected_file_name'; say in"
        " `preferences.columns` what they are called"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps({f"\x1b{number}" + "x" * 500: 1 for number in range(500)}))
    assert "'\\x1b0xxx" in refused(tmp_path) and "... (500 in all)" in refused(tmp_path)

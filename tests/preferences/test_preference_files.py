"""Preference files: every format gives the same rows; unreadable rows are reported by file and number."""

import gzip
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preference_sets import encoded, judged_scenes, pickapic_rows, write_parquet

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.files import fingerprint, read_rows, scan
from cdpo_ray.preferences.reader import Chunk, blocks_of, row_at
from cdpo_ray.preferences.rows import Fault, PreferenceSource, Row


def rows_of(source: PreferenceSource) -> list[Row | Fault]:
    return [row for chunk in scan(source).chunks for row in read_rows(chunk, source)]


def pair_rows(count: int, folder: Path) -> list[dict[str, Any]]:
    """Pairs with images beside the file."""
    rows = []
    for place, judged in enumerate(judged_scenes(count)):
        for name, pixels in (("right", judged.right), ("wrong", judged.wrong)):
            (folder / f"{place}-{name}.png").write_bytes(encoded(pixels))
        rows.append({"prompt": judged.prompt, "chosen": f"{place}-right.png", "rejected": f"{place}-wrong.png"})
    return rows


def write_jsonl(rows: list[Any], path: Path) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def content(image: bytes | str) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    judged = list(judged_scenes(20))
    write_parquet(pickapic_rows(20), tmp_path / "pickapic.parquet")
    pairs = pair_rows(20, tmp_path)
    write_jsonl(pairs, tmp_path / "pairs.jsonl")
    with_bytes = [
        {"prompt": row["prompt"]}
        | {name: {"bytes": (tmp_path / row[name]).read_bytes(), "path": None} for name in ("chosen", "rejected")}
        for row in pairs
    ]
    write_parquet(with_bytes, tmp_path / "pairs.parquet")
    for place, row in enumerate(pairs):
        folder = tmp_path / "ranked" / f"{place:03d}"
        folder.mkdir(parents=True)
        (folder / "prompt.txt").write_text(row["prompt"])
        (folder / "0-best.png").write_bytes((tmp_path / row["chosen"]).read_bytes())
        (folder / "1.png").write_bytes((tmp_path / row["rejected"]).read_bytes())
    sources = [
        PreferenceSource(str(tmp_path / "pickapic.parquet"), "pickapic"),
        PreferenceSource(str(tmp_path / "pairs.jsonl"), "pairs"),
        PreferenceSource(str(tmp_path / "pairs.parquet"), "pairs"),
        PreferenceSource(str(tmp_path / "ranked"), "ranked_folders"),
    ]
    for source in sources:
        found = rows_of(source)
        assert [row.prompt for row in found] == [one.prompt for one in judged]
        for row, one in zip(found, judged, strict=True):
            best, worst = np.argmax(row.labels), np.argmin(row.labels)
            assert content(row.images[best]) == encoded(one.right)
            assert content(row.images[worst]) == encoded(one.wrong)


def test_rows_are_numbered_across_files_chunks_and_row_groups(tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 7)):
        write_parquet(pickapic_rows(count), tmp_path / f"{name}.parquet", rows_per_group=4)
    source = PreferenceSource(str(tmp_path / "*.parquet"), "pickapic")
    found = scan(source)
    starts = [(Path(chunk.path).stem, chunk.first_number, chunk.first_index, chunk.num_rows) for chunk in found.chunks]
    assert starts == [("a", 1, 0, 4), ("a", 5, 4, 4), ("a", 9, 8, 2), ("b", 1, 10, 4), ("b", 5, 14, 3)]
    assert found.num_rows == len(found.prompts) == 17
    lines = write_jsonl(pair_rows(600, tmp_path), tmp_path / "pairs.jsonl")
    source = PreferenceSource(str(lines), "pairs")
    assert [chunk.first_number for chunk in scan(source).chunks] == [1, 257, 513]
    assert [row.number for row in rows_of(source)] == list(range(1, 601))


def test_small_chunks_are_grouped_in_order_and_large_ones_stay_alone() -> None:
    sizes = [1] * 300 + [1000, 100, 200, 5]
    chunks = [Chunk("file", start, num_rows, 1, 0) for start, num_rows in enumerate(sizes)]
    blocks = list(blocks_of(chunks))
    assert [chunk for block in blocks for chunk in block] == chunks
    assert [len(block) for block in blocks] == [256, 45, 2, 1]


def test_ties_and_unlabelled_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = pickapic_rows(6)
    rows[1] |= {"label_0": 0.5, "label_1": 0.5}
    rows[4] |= {"has_label": False}
    source = PreferenceSource(str(write_parquet(rows, tmp_path / "set.parquet")), "pickapic")
    found = scan(source)
    assert (found.num_rows, found.num_tied, found.num_unlabelled, len(found.prompts)) == (6, 1, 1, 4)
    assert [row.number for row in rows_of(source)] == [1, 3, 4, 6]


def test_difficulty_comes_from_labels_scores_or_ranks(tmp_path: Path) -> None:
    rows = [row | {"chosen_score": 2.5, "rejected_score": 3.0, "good": 1, "bad": 4} for row in pair_rows(1, tmp_path)]
    path = str(write_jsonl(rows, tmp_path / "pairs.jsonl"))
    renamed = {"chosen_rank": "good", "rejected_rank": "bad"}
    for difficulty, scores in {"label": (1.0, 0.0), "score": (2.5, 3.0), "rank": (-1.0, -4.0)}.items():
        (row,) = rows_of(PreferenceSource(path, "pairs", renamed, difficulty))
        assert isinstance(row, Row)
        assert (row.labels, row.scores) == ((1.0, 0.0), scores)


def test_file_names_of_a_ranked_folder_give_the_ranks_and_equal_ranks_tie(tmp_path: Path) -> None:
    folder = tmp_path / "ranked" / "one"
    folder.mkdir(parents=True)
    (folder / "prompt.txt").write_text("\ufeffa cat\n", encoding="utf-8")
    for name in ("10-c.png", "2.jpg", "2-b.webp"):
        (folder / name).write_bytes(b"x")
    (row,) = rows_of(PreferenceSource(str(folder.parent), "ranked_folders"))
    assert isinstance(row, Row)
    assert (row.prompt, row.labels) == ("a cat", (-10.0, -2.0, -2.0))


def test_the_fingerprint_depends_on_names_and_sizes(tmp_path: Path) -> None:
    source = PreferenceSource(str(tmp_path / "*.jsonl"), "pairs")
    write_jsonl(["{}"], tmp_path / "a.jsonl")
    first = fingerprint(source)
    assert first == fingerprint(source)
    write_jsonl(["{}"], tmp_path / "b.jsonl")
    second = fingerprint(source)
    write_jsonl(["{ }"], tmp_path / "b.jsonl")
    assert len({first, second, fingerprint(source)}) == 3


def test_the_fingerprint_distinguishes_files_of_the_same_name_and_survives_a_move(
    tmp_path: Path,
) -> None:
    for place, rows in (("a", ["{}"]), ("b", ["{} "])):
        (tmp_path / "set" / place).mkdir(parents=True)
        write_jsonl(rows, tmp_path / "set" / place / "train.jsonl")
    before = fingerprint(PreferenceSource(str(tmp_path / "set" / "*" / "train.jsonl"), "pairs"))
    (tmp_path / "set").rename(tmp_path / "moved")
    source = PreferenceSource(str(tmp_path / "moved" / "*" / "train.jsonl"), "pairs")
    assert fingerprint(source) == before
    write_jsonl([" {}"], tmp_path / "moved" / "a" / "train.jsonl")
    assert fingerprint(source) != before


def jsonl_of_paths(folder: Path) -> tuple[PreferenceSource, Path]:
    return PreferenceSource(
        str(write_jsonl(pair_rows(2, folder), folder / "pairs.jsonl")), "pairs"
    ), folder / "1-wrong.png"


def jsonl_of_structs(folder: Path) -> tuple[PreferenceSource, Path]:
    rows = [row | {name: {"path": row[name]} for name in ("chosen", "rejected")} for row in pair_rows(2, folder)]
    return PreferenceSource(str(write_jsonl(rows, folder / "pairs.jsonl")), "pairs"), folder / "0-right.png"


def parquet_of_paths(folder: Path) -> tuple[PreferenceSource, Path]:
    return PreferenceSource(
        str(write_parquet(pair_rows(2, folder), folder / "a.parquet")), "pairs"
    ), folder / "1-right.png"


def parquet_of_structs(folder: Path) -> tuple[PreferenceSource, Path]:
    rows = [
        row | {name: {"bytes": None, "path": row[name]} for name in ("chosen", "rejected")}
        for row in pair_rows(2, folder)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("prompt", pa.string()), ("chosen", kind), ("rejected", kind)])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "a.parquet")
    return PreferenceSource(str(folder / "a.parquet"), "pairs"), folder / "0-wrong.png"


def ranked(folder: Path) -> tuple[PreferenceSource, Path]:
    (folder / "ranked" / "one").mkdir(parents=True)
    for name in ("prompt.txt", "0-best.png", "1.png"):
        (folder / "ranked" / "one" / name).write_bytes(b"x" * 50)
    return PreferenceSource(str(folder / "ranked"), "ranked_folders"), folder / "ranked" / "one" / "1.png"


@pytest.mark.parametrize("write", [jsonl_of_paths, jsonl_of_structs, parquet_of_paths, parquet_of_structs, ranked])
def test_fault_47_an_image_changed_in_place_changes_the_fingerprint(
    write: Callable[[Path], tuple[PreferenceSource, Path]], tmp_path: Path
) -> None:
    source, image = write(tmp_path)
    before, content = fingerprint(source), bytearray(image.read_bytes())
    content[40] ^= 1
    times = image.stat().st_atime_ns, image.stat().st_mtime_ns
    image.write_bytes(content)
    os.utime(image, ns=times)
    after = fingerprint(source)
    image.unlink()
    assert len({before, after, fingerprint(source)}) == 3


def test_fault_47_swapped_preferences_of_the_same_file_size_change_the_fingerprint(tmp_path: Path) -> None:
    rows = [row | {"label_0": 1, "label_1": 0} for row in pickapic_paths(tmp_path)]
    source = PreferenceSource(str(write_jsonl(rows, tmp_path / "a.jsonl")), "pickapic")
    before, size = fingerprint(source), (tmp_path / "a.jsonl").stat().st_size
    write_jsonl([row | {"label_0": 0, "label_1": 1} for row in rows], tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").stat().st_size == size and fingerprint(source) != before


def pickapic_paths(folder: Path) -> list[dict[str, Any]]:
    return [
        {"caption": row["prompt"], "jpg_0": row["chosen"], "jpg_1": row["rejected"]} for row in pair_rows(3, folder)
    ]


def test_fault_47_rows_with_unreadable_image_names_do_not_prevent_a_fingerprint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    names = [
        "pipe",
        "/dev/zero",
        "nul\0.png",
        "x" * 300,
        "https://host/cat.png",
        "data:image/png;base64," + "A" * 10**6,
    ]
    rows = [{"prompt": "a cat", "chosen": name, "rejected": "missing.png"} for name in names]
    source = PreferenceSource(str(write_jsonl(rows, tmp_path / "pairs.jsonl")), "pairs")
    assert fingerprint(source) == fingerprint(source)


def test_fault_21_every_broken_jsonl_line_is_reported_with_file_and_number(tmp_path: Path) -> None:
    good = pair_rows(1, tmp_path)[0]
    path = tmp_path / "pairs.jsonl"
    lines = [
        b"\xef\xbb\xbf" + json.dumps(good).encode(),
        b'{"prompt": "a cat", ',
        b'{"prompt": "\xff"}',
        b'["a list"]',
        json.dumps(good | {"prompt": " "}).encode(),
        json.dumps(good | {"chosen": 5}).encode(),
        json.dumps({"prompt": "a cat", "chosen": "1.png"}).encode(),
        b"",
        json.dumps(good).encode(),
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = scan(PreferenceSource(str(path), "pairs"))
    assert [(fault.number, fault.reason.split(":")[0]) for fault in found.faults] == [
        (2, "is not JSON"),
        (3, "is not UTF-8 (byte 0xff)"),
        (4, "must be an object, got list"),
        (5, "`prompt` must be a non-empty string, got ' '"),
        (6, "`chosen` must be an image's bytes or its path, got int"),
        (7, "`rejected` must be an image's bytes or its path, got NoneType"),
    ]
    assert found.prompts == [good["prompt"]] * 2 and found.num_rows == 8
    source = PreferenceSource(str(path), "pairs")
    with pytest.raises(PreferenceError, match=r"6 of 8 rows cannot be read, more .*= 0\.7; .*\n  .*l:2: is not JSON"):
        found.refuse_unusable(source, 0.7)
    found.refuse_unusable(source, 0.75)


def test_a_missing_column_is_reported_with_the_columns_of_the_file(tmp_path: Path) -> None:
    path = str(write_parquet([{"text": "a cat", "chosen": b"x", "rejected": b"y"}], tmp_path / "pairs.parquet"))
    with pytest.raises(PreferenceError, match=r"has no column 'prompt', got 'text', 'chosen', 'rejected'; give their"):
        scan(PreferenceSource(path, "pairs"))
    assert scan(PreferenceSource(path, "pairs", {"prompt": "text"})).prompts == ["a cat"]
    with pytest.raises(PreferenceError, match=r"must map some of prompt, chosen, .*, got promt"):
        scan(PreferenceSource(path, "pairs", {"promt": "text"}))


def test_a_label_that_is_not_a_number_is_reported_with_its_row(tmp_path: Path) -> None:
    rows = pickapic_rows(3)
    rows[1]["label_0"] = None
    source = PreferenceSource(str(write_parquet(rows, tmp_path / "set.parquet")), "pickapic")
    assert [str(fault) for fault in scan(source).faults] == [f"{source.path}:2: `label_0` must be a number, got None"]


def test_fault_23_a_column_of_pickled_objects_is_refused_and_not_read(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"prompt": "a cat", "chosen": b"x", "rejected": b"y"}])
    marked = pa.field("chosen", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    pq.write_table(
        table.cast(pa.schema([table.schema.field("prompt"), marked, table.schema.field("rejected")])),
        tmp_path / "a.parquet",
    )
    with pytest.raises(PreferenceError, match=r"a\.parquet: column 'chosen' holds objects of .* were not read"):
        scan(PreferenceSource(str(tmp_path / "a.parquet"), "pairs"))


@pytest.mark.parametrize(
    ("name", "format_name", "message"),
    [
        ("nothing-*.parquet", "pairs", r"nothing-\*\.parquet: not found: /.*; give a file, a folder of files"),
        ("empty", "ranked_folders", r"empty: not found: /.*; give a folder that holds one folder per prompt"),
        ("empty", "pairs", r"empty: must hold files that end in \.parquet, .*, got an empty folder"),
        ("a.txt", "pairs", r"a\.txt: must end in \.parquet, .* \(\.tar and text also with \.gz\), got '\.txt'"),
        ("a.parquet", "pairs", r"a\.parquet: cannot be read as Parquet"),
        ("empty.jsonl", "pairs", r"empty\.jsonl: must have rows, got none"),
    ],
)
def test_missing_and_unsupported_files_are_refused_by_name(
    tmp_path: Path, name: str, format_name: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("prompt\n")
    (tmp_path / "a.parquet").write_text("not Parquet")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(PreferenceError, match=message):
        scan(PreferenceSource(str(tmp_path / name), format_name))


def test_fault_19_a_ranked_folder_without_prompt_ranks_or_a_second_image_is_reported(tmp_path: Path) -> None:
    for name, files in {
        "a": ["0.png", "1.png"],
        "b": ["prompt.txt", "0.png"],
        "c": ["prompt.txt", "0.png", "cat.png"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("a cat")
    reasons = [fault.reason for fault in scan(PreferenceSource(str(tmp_path), "ranked_folders")).faults]
    assert reasons[0].startswith("`prompt.txt` cannot be read")
    assert reasons[1:] == [
        "must hold at least 2 images, got 1",
        "names must start with the rank, 0 for the best, got cat.png",
    ]


def test_fault_56_a_named_pipe_among_preferences_is_refused_without_blocking(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "prompt.txt")
    (fault,) = scan(PreferenceSource(str(tmp_path), "ranked_folders")).faults
    assert "is a pipe, a device or a socket, not a regular file" in fault.reason
    os.mkfifo(tmp_path / "pairs.jsonl")
    with pytest.raises(PreferenceError, match="is not a regular file, or is a broken link"):
        scan(PreferenceSource(str(tmp_path / "pairs.jsonl"), "pairs"))


def faulty(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of Pick-a-Pic, some of them made unreadable."""
    rows[1]["caption"] = None
    rows[2]["caption"] = " "
    rows[3]["label_0"] = None
    rows[4]["label_1"] = float("nan")
    rows[5]["label_0"] = float("inf")
    rows[6] |= {"label_0": 0.5, "label_1": 0.5}
    rows[7] |= {"has_label": False, "label_0": None}
    rows[8]["jpg_0"] = None
    rows[9] |= {"label_0": 0.5, "label_1": 0.5, "jpg_0": None}
    return rows


def as_json(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value.hex() if isinstance(value, bytes) else value for name, value in row.items()} for row in rows]


def test_fault_38_bad_rows_are_reported_equally_for_jsonl_and_parquet(tmp_path: Path) -> None:
    write_parquet(faulty(pickapic_rows(20)), tmp_path / "a.parquet")
    write_jsonl(as_json(faulty(pickapic_rows(20))), tmp_path / "a.jsonl")
    reported = {}
    for name in ("a.parquet", "a.jsonl"):
        source = PreferenceSource(str(tmp_path / name), "pickapic")
        found = scan(source)
        assert (found.num_rows, found.num_tied, found.num_unlabelled) == (20, 2, 1)
        assert [row.rpartition(":")[2] for row in (*found.tied, *found.unlabelled)] == ["7", "10", "8"]
        read = [row for chunk in found.chunks for row in read_rows(chunk, source)]
        reported[name] = [(fault.number, fault.reason) for fault in read if isinstance(fault, Fault)]
        assert len(read) == 17
    assert reported["a.parquet"] == reported["a.jsonl"]
    assert reported["a.jsonl"] == [
        (2, "`caption` must be a non-empty string, got None"),
        (3, "`caption` must be a non-empty string, got ' '"),
        (4, "`label_0` must be a number, got None"),
        (5, "`label_1` must be a number, got nan"),
        (6, "`label_0` must be a number, got inf"),
        (9, "`jpg_0` must be an image's bytes or its path, got NoneType"),
    ]


def test_fault_38_a_scan_with_images_reports_missing_ones(tmp_path: Path) -> None:
    write_parquet(faulty(pickapic_rows(20)), tmp_path / "a.parquet")
    pairs = pair_rows(3, tmp_path)
    (tmp_path / "1-right.png").unlink()
    write_jsonl(pairs, tmp_path / "b.jsonl")
    in_parquet = scan(PreferenceSource(str(tmp_path / "a.parquet"), "pickapic"), with_images=True)
    assert [fault.number for fault in in_parquet.faults] == [2, 3, 4, 5, 6, 9]
    structs = [row | {"jpg_0": {"bytes": row["jpg_0"], "path": None}} for row in faulty(pickapic_rows(20))]
    write_parquet(structs, tmp_path / "c.parquet")
    in_structs = scan(PreferenceSource(str(tmp_path / "c.parquet"), "pickapic"), with_images=True)
    assert [fault.number for fault in in_structs.faults] == [2, 3, 4, 5, 6, 9]
    found = scan(PreferenceSource(str(tmp_path / "b.jsonl"), "pairs"), with_images=True)
    assert [str(fault) for fault in found.faults] == [f"{tmp_path}/b.jsonl:2: {tmp_path}/1-right.png: no such file"]
    assert found.lines() == [
        "1 file, 3 rows: 2 with a preference, 0 tied, 0 unlabelled, 1 cannot be read",
        f"cannot be read: {found.faults[0]}",
    ]


def test_fault_38_a_scan_does_not_read_complete_images_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(pickapic_rows(4)), path, use_dictionary=False, compression="none")
    image = pq.read_metadata(path).row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start, size = image.data_page_offset, image.total_compressed_size
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    assert len(scan(PreferenceSource(str(path), "pickapic"), with_images=True).prompts) == 4


def test_fault_38_blank_lines_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in pair_rows(3, tmp_path)]
    text = f"\ufeff\r\n{lines[0]}\r\n\r\n  \r\n{lines[1]}\r\n{lines[2]}\r\n\r\n\r\n"
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    source = PreferenceSource(str(tmp_path / "a.jsonl"), "pairs")
    found = scan(source)
    assert (found.num_rows, found.faults) == (3, [])
    assert [row.number for row in rows_of(source)] == [2, 5, 6]
    write_jsonl(pair_rows(1, tmp_path), tmp_path / "b.jsonl")
    starts = [chunk.first_index for chunk in scan(PreferenceSource(str(tmp_path / "*.jsonl"), "pairs")).chunks]
    assert starts == [0, 8], "one index per line, so that no two rows share one"


@pytest.mark.parametrize("off", [0, False, "0", "false", 0.0])
def test_fault_38_flags_and_labels_may_be_strings(tmp_path: Path, off: object) -> None:
    rows = as_json(pickapic_rows(2))
    rows[0] |= {"has_label": off}
    rows[1] |= {"has_label": 1, "label_0": "0", "label_1": "1.0"}
    source = PreferenceSource(str(write_jsonl(rows, tmp_path / "a.jsonl")), "pickapic")
    assert scan(source).num_unlabelled == 1
    (row,) = rows_of(source)
    assert isinstance(row, Row) and row.labels == (0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[" * 100_000, "is not JSON: maximum recursion depth"),
        ('{"prompt": ' + "1" * 5000 + "}", "is not JSON: Exceeds the limit"),
        ('{"prompt": "half \\ud83d"}', r"`prompt` holds half of a surrogate pair ('\ud83d')"),
        ('{"prompt": "' + "x" * 50_000 + '", "chosen": 5}', "`chosen` must be an image's bytes or its path, got int"),
        ('{"prompt": {"a": "' + "x" * 50_000 + '"}}', "`prompt` must be a non-empty string, got {'a': 'xxx"),
    ],
)
def test_fault_38_a_line_that_breaks_a_parser_is_a_fault_of_its_row(tmp_path: Path, value: str, reason: str) -> None:
    good = pair_rows(1, tmp_path)[0]
    found = scan(PreferenceSource(str(write_jsonl([good, value, good], tmp_path / "a.jsonl")), "pairs"))
    (fault,) = found.faults
    assert fault.number == 2 and fault.reason.startswith(reason) and len(fault.reason) < 300


def test_fault_38_parquet_text_that_is_not_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    captions = pa.array([b"a cat", b"caf\xe9", b"a dog"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": captions, "chosen": [b"x"] * 3, "rejected": [b"y"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    found = scan(PreferenceSource(str(tmp_path / "a.parquet"), "pairs"))
    assert [(fault.number, fault.reason) for fault in found.faults] == [(2, "is not UTF-8 (byte 0xe9)")]
    assert found.prompts == ["a cat", "a dog"]


def test_fault_38_control_characters_are_escaped_in_messages(tmp_path: Path) -> None:
    row = {"prompt": "a cat", "chosen": "\x1b[31m.png", "rejected": "0-right.png"}
    pair_rows(1, tmp_path)
    found = scan(PreferenceSource(str(write_jsonl([row], tmp_path / "a.jsonl")), "pairs"), with_images=True)
    assert str(found.faults[0]) == rf"{tmp_path}/a.jsonl:1: {tmp_path}/\x1b[31m.png: no such file"


def test_fault_38_a_set_without_preferences_is_refused_with_its_counts(tmp_path: Path) -> None:
    rows = as_json(pickapic_rows(3))
    for row in rows:
        row |= {"label_0": 0.5, "label_1": 0.5}
    source = PreferenceSource(str(write_jsonl(rows, tmp_path / "a.jsonl")), "pickapic")
    with pytest.raises(
        PreferenceError, match=r"must have a row with a preference, got 3 rows: 0 with a preference, 3 tied"
    ):
        scan(source).refuse_unusable(source, 0.01)


@pytest.mark.parametrize(
    "pattern", ["{}", "{}/**/*.parquet", "{}/**", "{}/*", "{}/x/../**/*.p*t", "{}/**/[a-c].PARQUET"]
)
def test_folders_and_patterns_name_every_file_once(tmp_path: Path, pattern: str) -> None:
    folder = tmp_path / "set [v2] (final)"
    (folder / "x" / "y").mkdir(parents=True)
    for name in ("a.parquet", "x/b.parquet", "x/y/c.parquet", ".cache.parquet"):
        write_parquet(
            pickapic_rows(2), folder / name.replace(".parquet", ".PARQUET" if "PAR" in pattern else ".parquet")
        )
    (folder / "again").symlink_to(folder / "x")
    (folder / "a-link.parquet").symlink_to(folder / "x" / "y")
    found = scan(PreferenceSource(pattern.format(folder), "pickapic"))
    assert (found.num_files, found.num_rows) == (3, 6)
    assert len(rows_of(PreferenceSource(pattern.format(folder), "pickapic"))) == 6


def test_other_files_in_a_folder_are_ignored(tmp_path: Path) -> None:
    write_jsonl(pair_rows(2, tmp_path), tmp_path / "a.JSONL")
    (tmp_path / "README.md").touch()
    assert scan(PreferenceSource(str(tmp_path), "pairs")).num_rows == 2
    with pytest.raises(PreferenceError, match=r"0-right\.png: must end in \.parquet, "):
        scan(PreferenceSource(f"{tmp_path}/*", "pairs"))


def test_compressed_lines_are_read_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    rows = pair_rows(600, tmp_path)
    packed = gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    source = PreferenceSource(str(tmp_path / "a.jsonl.gz"), "pairs")
    assert [row.number for row in rows_of(source)] == list(range(1, 601))
    assert [chunk.first_number for chunk in scan(source).chunks] == [1, 257, 513]
    for content in (packed[:-20], packed[:40] + b"\xff" * 40 + packed[80:], b"no gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(PreferenceError, match=r"a\.jsonl\.gz: cannot be read: .*; download or write it again"):
            scan(source)


def test_a_damaged_page_of_parquet_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(pickapic_rows(4)), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:12] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(PreferenceError, match=r"a\.parquet: cannot be read: "):
        scan(PreferenceSource(str(path), "pickapic"))


def test_a_named_pipe_and_a_broken_link_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("a.jsonl", "*"):
        with pytest.raises(PreferenceError, match=r"a\.jsonl: is not a regular file, or is a broken link"):
            scan(PreferenceSource(str(tmp_path / name), "pairs"))


def test_large_row_groups_are_reported_with_a_command_that_rewrites_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(pickapic_rows(600), tmp_path / "a.parquet", rows_per_group=600)
    source = PreferenceSource(str(path), "pickapic")
    assert scan(source).warnings == []
    monkeypatch.setattr("cdpo_ray.preferences.arrow_readers.MAX_ROW_GROUP_BYTES", 1000)
    (warning,) = scan(source).lines()[1:]
    assert warning.startswith(f"{path}: has a row group of 600 rows and 0.0 GB, which a single task reads")
    command = shlex.split(warning.partition("write smaller ones: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert pq.ParquetFile(tmp_path / "small-a.parquet").num_row_groups == 3
    assert pq.read_table(tmp_path / "small-a.parquet").equals(pq.read_table(path))


def test_a_row_group_is_read_page_by_page(tmp_path: Path) -> None:
    """Memory depends on the page size, not the row group: pandas writes one for the whole file."""
    rng = np.random.default_rng(0)
    image = rng.bytes(20_000)
    rows = {"prompt": ["a cat"] * 1500, "chosen": [image] * 1500, "rejected": [image] * 1500}
    pq.write_table(
        pa.table(rows), tmp_path / "a.parquet", use_dictionary=False, write_batch_size=50, compression="none"
    )
    source = PreferenceSource(str(tmp_path / "a.parquet"), "pairs")
    (chunk,) = scan(source).chunks
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_rows(chunk, source):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 20e6 < 2 * 1500 * len(image) == 60e6


def test_a_row_is_found_in_its_file_by_its_index_in_all_files() -> None:
    chunks = [Chunk("a.jsonl", 0, 3, 1, 0), Chunk("a.jsonl", 90, 2, 4, 3), Chunk("b.parquet", 0, 4, 1, 5)]
    expected = [(chunk.path, chunk.first_number + row) for chunk in chunks for row in range(chunk.num_rows)]
    assert [row_at(chunks, index) for index in range(9)] == expected

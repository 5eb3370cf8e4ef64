"""Every kind of file gives the same rows; damaged and malicious ones are refused or counted, within bounded memory."""

import csv
import gzip
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preference_sets import pickapic_rows, write_parquet

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.files import fingerprint, read_rows, scan
from cdpo_ray.preferences.locating import locate
from cdpo_ray.preferences.rows import Fault, PreferenceSource, Row
from cdpo_ray.preferences.text_readers import json_items

COUNT = 20


def rows_of(source: PreferenceSource) -> list[Row | Fault]:
    return [row for chunk in scan(source, with_images=True).chunks for row in read_rows(chunk, source)]


def content(image: bytes | str) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def with_paths(folder: Path) -> list[dict[str, Any]]:
    """Rows of Pick-a-Pic, with images beside the file."""
    rows = pickapic_rows(COUNT)
    for index, row in enumerate(rows):
        for name in ("jpg_0", "jpg_1"):
            (folder / f"{index}-{name}.png").write_bytes(row[name])
            row[name] = f"{index}-{name}.png"
    return rows


def delimited(path: Path, delimiter: str, before: str = "") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(pickapic_rows(1)[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(with_paths(path.parent))
    path.write_bytes((before + text.getvalue()).encode())
    return path


def packed(path: Path) -> Path:
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return path.with_name(f"{path.name}.gz")


def lines(path: Path) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in with_paths(path.parent)))
    return path


def json_list(path: Path, before: str = "") -> Path:
    path.write_text(before + json.dumps(with_paths(path.parent), indent=1))
    return path


def arrow(path: Path, write: Callable[..., Any]) -> Path:
    table = pa.Table.from_pylist(pickapic_rows(COUNT))
    with write(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes, **header: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in header.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def webdataset(path: Path, mode: str = "w") -> Path:
    """Members as in the shards of Pick-a-Pic that are published."""
    with tarfile.open(path, mode) as archive:
        for index, row in enumerate(pickapic_rows(COUNT)):
            for name in ("jpg_0", "jpg_1"):
                add(archive, f"./shard/{index:05d}.{name}.jpg", row[name])
            for name in ("label_0", "label_1"):
                add(archive, f"./shard/{index:05d}.{name}.txt", str(row[name]).encode())
            add(archive, f"./shard/{index:05d}.original_prompt.txt", row["caption"].encode())
    return path


def webdataset_with_json(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for index, row in enumerate(pickapic_rows(COUNT)):
            columns = {name: value for name, value in row.items() if not isinstance(value, bytes)}
            add(archive, f"{index}.json", json.dumps(columns).encode())
            add(archive, f"{index}.0.png", row["jpg_0"])
            add(archive, f"{index}.1.png", row["jpg_1"])
    return path


CONTAINERS: dict[str, Callable[[Path], Path]] = {
    "upper case": lambda folder: write_parquet(pickapic_rows(COUNT), folder / "A.PARQUET"),
    "arrow stream": lambda folder: arrow(folder / "a.arrow", pa.ipc.new_stream),
    "arrow file": lambda folder: arrow(folder / "a.arrow", pa.ipc.new_file),
    "json": lambda folder: json_list(folder / "a.json", "\ufeff \n"),
    "json.gz": lambda folder: packed(json_list(folder / "a.json")),
    "json lines in .json": lambda folder: lines(folder / "a.json"),
    "jsonl.gz": lambda folder: packed(lines(folder / "A.JSONL")),
    "comma": lambda folder: delimited(folder / "a.csv", ","),
    "semicolon": lambda folder: delimited(folder / "a.csv", ";", "\ufeff"),
    "tab": lambda folder: delimited(folder / "a.tsv", "\t"),
    "tab in csv.gz": lambda folder: packed(delimited(folder / "a.CSV", "\t")),
    "Excel's first line": lambda folder: delimited(folder / "a.csv", ";", "sep=;\r\n"),
    "tar": lambda folder: webdataset(folder / "a.tar"),
    "tar with json": lambda folder: webdataset_with_json(folder / "a.tar"),
    "tar.gz": lambda folder: webdataset(folder / "a.tar.gz", "w:gz"),
    "tgz": lambda folder: webdataset(folder / "A.TGZ", "w:gz"),
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("by_folder", [False, True])
def test_every_kind_of_file_gives_the_rows_of_parquet(tmp_path: Path, kind: str, by_folder: bool) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "set").mkdir()
    write_parquet(pickapic_rows(COUNT), tmp_path / "reference" / "a.parquet")
    expected = rows_of(PreferenceSource(str(tmp_path / "reference"), "pickapic"))
    path = CONTAINERS[kind](tmp_path / "set")
    source = PreferenceSource(str(path.parent if by_folder else path), "pickapic")
    found = rows_of(source)
    assert len(found) == len(expected) == COUNT
    for row, same in zip(found, expected, strict=True):
        assert isinstance(row, Row) and isinstance(same, Row)
        assert (row.prompt, row.labels) == (same.prompt, same.labels)
        assert list(map(content, row.images)) == list(map(content, same.images))
    chunks = scan(source).chunks
    ends = [chunk.first_index + chunk.num_rows for chunk in chunks]
    assert [chunk.first_index for chunk in chunks] == [0, *ends[:-1]], "one index per row"
    before = fingerprint(source)
    path.parent.rename(tmp_path / "moved")
    assert fingerprint(PreferenceSource(str(tmp_path / "moved"), "pickapic")) == before


def test_a_file_that_is_read_from_its_start_is_cut_into_a_bounded_number_of_chunks(tmp_path: Path) -> None:
    rows = [{"prompt": f"cat {number}", "chosen": "a.png", "rejected": "b.png"} for number in range(9000)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = PreferenceSource(str(tmp_path / "a.json"), "pairs")
    chunks = scan(source).chunks
    assert len(chunks) == 16
    for chunk in (chunks[0], chunks[7], chunks[-1]):
        prompts = [row.prompt for row in read_rows(chunk, source) if isinstance(row, Row)]
        assert prompts == [f"cat {number}" for number in range(chunk.first_index, chunk.first_index + chunk.num_rows)]


def test_quoted_line_breaks_and_delimiters_belong_to_the_text(tmp_path: Path) -> None:
    prompt = 'a "big" cat,\nand; a\tdog'
    for delimiter in ",;\t|":
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=delimiter).writerows([["rejected", "prompt", "chosen"], ["b.png", prompt, "a.png"]])
        (tmp_path / "a.csv").write_bytes(text.getvalue().encode())
        (row,) = rows_without_check(PreferenceSource(str(tmp_path / "a.csv"), "pairs"))
        assert isinstance(row, Row)
        assert (row.prompt, row.images) == (prompt, (f"{tmp_path}/a.png", f"{tmp_path}/b.png"))


def rows_without_check(source: PreferenceSource) -> list[Row | Fault]:
    return [row for chunk in scan(source).chunks for row in read_rows(chunk, source)]


def test_fault_38_bad_records_of_a_text_table_are_faults_of_their_lines(tmp_path: Path) -> None:
    images = b",a.png,b.png"
    lines = [b"prompt,chosen,rejected", b"a cat" + images, b"", b"a dog,a.png", b'"caf\xe9"' + images, images]
    lines += [b",,", b"a cow" + images, b"a hen;a.png;b.png", b""]
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    found = scan(PreferenceSource(str(tmp_path / "a.csv"), "pairs"))
    assert [(fault.number, fault.reason.split(";")[0]) for fault in found.faults] == [
        (4, "must have 3 fields as the header, got 2"),
        (5, "is not UTF-8 (byte 0xe9)"),
        (6, "`prompt` must be a non-empty string, got ''"),
        (9, "must have 3 fields as the header, got 1"),
    ]
    assert found.prompts == ["a cat", "a cow"]
    (tmp_path / "a.csv").write_text("prompt,chosen,chosen,rejected\na,b,c,d\n")
    (tmp_path / "b.csv").write_text("\nprompt,chosen,rejected\na,b,c\n")
    with pytest.raises(PreferenceError, match=r"b\.csv: must name its columns in its first line, which is empty"):
        scan(PreferenceSource(str(tmp_path / "b.csv"), "pairs"))
    with pytest.raises(PreferenceError, match=r"a\.csv: has column 'chosen' twice; rename or remove one"):
        scan(PreferenceSource(str(tmp_path / "a.csv"), "pairs"))


def test_lists_in_text_tables_may_be_json_or_python(tmp_path: Path) -> None:
    for paths in ('["a.png", "b.png"]', "['a.png', 'b.png']"):
        text = io.StringIO(newline="")
        rows = [["prompt", "image_path", "human_preference"], ["a cat", paths, "[0, 1]"]]
        csv.writer(text).writerows(rows)
        (tmp_path / "a.csv").write_bytes(text.getvalue().encode())
        (row,) = rows_without_check(PreferenceSource(str(tmp_path / "a.csv"), "hpdv2"))
        assert isinstance(row, Row)
        assert (row.images, row.labels) == ((f"{tmp_path}/a.png", f"{tmp_path}/b.png"), (0, 1))
    (tmp_path / "a.csv").write_text("prompt,image_path,human_preference\na cat,__import__('os').getcwd(),1\n")
    (fault,) = scan(PreferenceSource(str(tmp_path / "a.csv"), "hpdv2")).faults
    assert fault.reason.startswith("`human_preference` must be a list with one value per image, got 1")


@pytest.mark.parametrize("size", [1, 7, 64, 2**16])
def test_a_json_list_is_read_item_by_item_at_any_buffer_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"a": 'x"]},{\\', "b": [1.5e-3, None, True, -12]}, {}, [], "é\u2028", {"c": "😀" * 50}]
    monkeypatch.setattr("cdpo_ray.preferences.text_readers.TEXT_AT_ONCE", size)
    for text in (json.dumps(items), json.dumps(items, indent=2, ensure_ascii=False), " [ ] "):
        assert list(json_items(io.StringIO(text))) == json.loads(text)
    objects = [item for item in items if isinstance(item, dict)]
    assert list(json_items(io.StringIO("\n".join(map(json.dumps, objects))))) == objects
    assert list(json_items(io.StringIO(""))) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"prompt": "a"}, {"prompt": "b"', "in item 2"),
        ('[{"prompt": "a"}, ', "the list is cut off after item 1"),
        ('[{"prompt": "a"}, {"prompt": "b', "Unterminated string.* in item 2"),
        ('[{"prompt": "a"}, {prompt: 1}, ' + '{"prompt": "b"}' * 1000, "Expecting property name .* in item 2"),
        ("[" + "[" * 100_000, "recursion"),
        ('[{"prompt": "a"}] [{"prompt": "b"}]', "text follows the list of 1 items"),
    ],
)
def test_fault_21_a_damaged_json_list_is_refused_with_the_item(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(PreferenceError, match=rf"a\.json: is not JSON: .*{reason}"):
        scan(PreferenceSource(str(tmp_path / "a.json"), "pairs"))


def test_memory_does_not_grow_with_a_json_list(tmp_path: Path) -> None:
    peaks = []
    for count in (2_000, 20_000):
        row = {"prompt": "a cat" * 20, "chosen": "a.png", "rejected": "b.png"}
        (tmp_path / "a.json").write_text(json.dumps([row] * count))
        with (tmp_path / "a.json").open() as handle:
            tracemalloc.start()
            assert sum(1 for _ in json_items(handle)) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 2e6


def saved(folder: Path, num_shards: int = 2, splits: tuple[str, ...] = ()) -> Path:
    """Folder as written by `save_to_disk`, by `datasets` itself."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(pickapic_rows(COUNT))
    rows = rows.cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    written = datasets.DatasetDict(dict.fromkeys(splits, rows)) if splits else rows
    written.save_to_disk(folder, **({} if splits else {"num_shards": num_shards}))
    return folder


def test_folders_of_datasets_are_read_without_caches_and_shards_of_earlier_saves(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", num_shards=3)
    (folder / "cache-0123456789abcdef.arrow").write_bytes((folder / "data-00000-of-00003.arrow").read_bytes())
    (folder / "data-00000-of-00001.arrow").write_bytes((folder / "data-00000-of-00003.arrow").read_bytes())
    for path in (folder, folder / "dataset_info.json", folder / "*", tmp_path):
        source = PreferenceSource(str(path), "pickapic")
        assert [row.prompt for row in rows_of(source) if isinstance(row, Row)] == [
            row["caption"] for row in pickapic_rows(COUNT)
        ]
    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(PreferenceError, match=r"set: lacks data-00001-of-00003\.arrow; copy the folder again"):
        scan(PreferenceSource(str(folder), "pickapic"))


def test_names_in_the_state_of_a_saved_folder_are_compared_and_never_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", num_shards=1)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../outside.arrow"}]}))
    (tmp_path / "outside.arrow").write_bytes((folder / "data-00000-of-00001.arrow").read_bytes())
    with pytest.raises(PreferenceError, match=r"set: lacks \.\./outside\.arrow"):
        scan(PreferenceSource(str(folder), "pickapic"))


def test_the_only_split_of_a_dataset_dict_is_read_and_several_are_refused(tmp_path: Path) -> None:
    assert scan(PreferenceSource(str(saved(tmp_path / "one", splits=("train",))), "pickapic")).num_rows == COUNT
    folder = saved(tmp_path / "two", splits=("train", "test"))
    with pytest.raises(PreferenceError, match=r"two: holds the splits test, train of a `DatasetDict`; give the folder"):
        scan(PreferenceSource(str(folder), "pickapic"))
    assert scan(PreferenceSource(f"{folder}/train", "pickapic")).num_rows == COUNT
    assert scan(PreferenceSource(f"{folder}/*", "pickapic")).num_rows == 2 * COUNT


@pytest.mark.parametrize("write", [pa.ipc.new_stream, pa.ipc.new_file])
def test_fault_21_a_damaged_arrow_file_is_refused_by_name(tmp_path: Path, write: Callable[..., Any]) -> None:
    path = arrow(tmp_path / "a.arrow", write)
    whole = path.read_bytes()
    broken = {"cut": whole[: len(whole) // 2], "text": b"no Arrow", "empty": b"", "ones": whole[:8] + b"\xff" * 500}
    for damaged in broken.values():
        path.write_bytes(damaged)
        with pytest.raises(PreferenceError, match=r"a\.arrow: cannot be read: .*; download or write it again"):
            rows_of(PreferenceSource(str(path), "pickapic"))


def test_fault_21_offsets_outside_the_buffers_of_an_arrow_file_are_refused_not_followed(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a cat", "a dog!!"], "chosen": [b"\x89x"] * 2, "rejected": [b"\x89y"] * 2})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    offsets = [np.array([0, 5, end], np.int32).tobytes() for end in (12, 2**30)]
    content = (tmp_path / "a.arrow").read_bytes()
    assert content.count(offsets[0]) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(*offsets))
    with pytest.raises(PreferenceError, match=r"a\.arrow: cannot be read: "):
        rows_of(PreferenceSource(str(tmp_path / "a.arrow"), "pairs"))


@pytest.mark.parametrize("ending", ["arrow", "parquet"])
def test_fault_23_pickled_objects_inside_structs_and_lists_are_refused(tmp_path: Path, ending: str) -> None:
    marked = pa.field("bytes", pa.binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    schema = pa.schema(
        [("prompt", pa.string()), ("images", pa.list_(pa.struct([marked]))), ("ratings", pa.list_(pa.int64()))]
    )
    table = pa.Table.from_pylist([{"prompt": "a", "images": [{"bytes": b"x"}] * 2, "ratings": [1, 0]}], schema)
    if ending == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "a.arrow", schema) as writer:
            writer.write_table(table)
    with pytest.raises(PreferenceError, match=rf"a\.{ending}: column 'images' holds objects of .* were not read"):
        scan(PreferenceSource(str(tmp_path / f"a.{ending}"), "image_list"))


def pair(archive: tarfile.TarFile, key: str, image: bytes = b"\x89PNG", **columns: Any) -> None:
    add(archive, f"{key}.json", json.dumps({"prompt": "a cat"} | columns).encode())
    add(archive, f"{key}.chosen.png", image)
    add(archive, f"{key}.rejected.png", image)


def test_fault_38_names_of_tar_members_never_become_paths(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    path = tmp_path / "set" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for key in ("../../escaped", "/absolute", "a/../b", "C:\\x", "."):
            pair(archive, key)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            add(archive, f"odd{kind!r}.json", b'{"prompt": "a dog"}')
            add(archive, f"odd{kind!r}.chosen.png", b"", type=kind, linkname="../secret.png")
            add(archive, f"odd{kind!r}.rejected.png", b"", type=kind, linkname="/etc/passwd")
        for name in ("../secret.png", "/etc/passwd", str(tmp_path / "secret.png"), "~/x.png"):
            add(archive, f"named{len(name)}.json", json.dumps({"prompt": "a cow", "chosen": name}).encode())
            add(archive, f"named{len(name)}.rejected.png", b"\x89PNG")
        for name in ("._hidden.json", ".json", "README", "dir/"):
            add(archive, name, b"{}")
    source = PreferenceSource(str(path), "pairs")
    found = rows_of(source)
    kept = [row for row in found if isinstance(row, Row)]
    assert [row.images for row in kept] == [(b"\x89PNG", b"\x89PNG")] * 4
    faults = [row for row in found if isinstance(row, Fault)]
    assert len(faults) == 9
    assert all("must be in the archive, got the path" in fault.reason for fault in faults[5:])
    assert sorted(os.listdir(tmp_path)) == ["secret.png", "set"] and os.listdir(path.parent) == ["a.tar"]


def test_fault_38_members_beyond_the_size_limit_and_sparse_ones_are_faults_that_are_not_read(tmp_path: Path) -> None:
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "c.rejected.png"}
    sparse |= {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**40)}
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        pair(archive, "a")
        pair(archive, "b", image=b"\x89" * 3_000_000)
        add(archive, "c.json", b'{"prompt": "a cat"}')
        add(archive, "c.chosen.png", b"\x89PNG")
        add(archive, "c.rejected.png", b"x", pax_headers=sparse)
        add(archive, "d.json", b" " * 2_000_000 + b"{}")
        pair(archive, "e")
    source = PreferenceSource(str(tmp_path / "a.tar"), "pairs", max_image_bytes=1_000_000)
    tracemalloc.start()
    found = rows_of(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.number for row in found if isinstance(row, Row)] == [1, 5]
    assert [(row.number, row.reason) for row in found if isinstance(row, Fault)] == [
        (2, "`chosen.png` has 3,000,000 bytes, more than 1,000,000"),
        (3, "`rejected.png` is a sparse file"),
        (4, "`prompt` must be a non-empty string, got None"),
    ]
    assert peak < 8e6


def test_fault_38_a_tar_header_of_any_size_is_not_read_into_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.json")
    header.size, header.type = 2**33 - 1024, tarfile.XHDTYPE
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT))
    with (tmp_path / "a.tar").open("r+b") as handle:
        handle.truncate(2**33)  # a sparse file: no disk space
    with pytest.raises(PreferenceError, match=r"a\.tar: cannot be read: a header of 8,589,933,568 bytes"):
        scan(PreferenceSource(str(tmp_path / "a.tar"), "pairs"))


def test_fault_21_a_damaged_tar_is_refused_not_read_in_part(tmp_path: Path) -> None:
    path = webdataset(tmp_path / "a.tar")
    whole = path.read_bytes()
    middle = 512 * (len(whole) // 1024)
    negative = bytearray(whole)
    negative[124:136] = b"\xff" * 12
    broken = {
        "cut": whole[: middle + 100],
        "overwritten": whole[:middle] + b"\x55" * 40_000 + whole[middle + 40_000 :],
        "negative size": bytes(negative),
        "text": b"no archive" * 100,
    }
    for damaged in broken.values():
        path.write_bytes(damaged)
        with pytest.raises(PreferenceError, match=r"a\.tar: cannot be read: .*; download or write it again"):
            scan(PreferenceSource(str(path), "pickapic"))
    packed_path = webdataset(tmp_path / "b.tar.gz", "w:gz")
    packed_path.write_bytes(packed_path.read_bytes()[:-3000])
    with pytest.raises(PreferenceError, match=r"b\.tar\.gz: cannot be read: "):
        scan(PreferenceSource(str(packed_path), "pickapic"))


def test_a_scan_of_a_tar_does_not_read_complete_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for key in range(4):
            pair(archive, str(key), image=b"\x89" * 500_000)
    source = PreferenceSource(str(tmp_path / "a.tar"), "pairs")
    tracemalloc.start()
    assert len(scan(source, with_images=True).prompts) == 4
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        add(archive, "5.json", b'{"prompt": "a cat"}')
        pair(archive, "6")
        add(archive, "6.json", b"{}")
        add(archive, "7.prompt.txt", b"caf\xe9")
        add(archive, "8.chosen.png", b"\x89PNG")
        add(archive, "8.json", b'{"prompt": "a cow", "chosen": "original.png"}')
        add(archive, "8.rejected.png", b"\x89PNG")
        add(archive, "9.json", b'{"prompt": ')
    found = scan(source, with_images=True)
    assert [fault.reason for fault in found.faults] == [
        "`chosen` must be an image's bytes or its path, got NoneType",
        "has the member `json` twice",
        "is not UTF-8 (byte 0xe9)",
        "`prompt` must be a non-empty string, got None",
    ]
    assert found.prompts[-1] == "a cow"


def test_of_several_kinds_in_a_folder_one_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl")
    json_list(tmp_path / "train.json")
    (tmp_path / "stats.json").write_text("{}")
    source = PreferenceSource(str(tmp_path), "pickapic")
    paths, warnings = locate(source)
    assert [path.name for path in paths] == ["a.jsonl"]
    assert warnings == [f"{tmp_path}: 2 .json left out, .jsonl read; give a pattern to read others"]
    assert scan(source).lines()[-1] == warnings[0]
    assert scan(PreferenceSource(f"{tmp_path}/t*.json", "pickapic")).num_rows == COUNT

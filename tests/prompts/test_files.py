"""Prompt files: prompts are read unchanged, and all faults are reported at once with their place."""

import csv
import gzip
import io
import json
import pickle
import re
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpo_ray.errors import PromptError
from cdpo_ray.prompts import files
from cdpo_ray.prompts.files import FORMATS, read_csv
from cdpo_ray.prompts.parquet import ROWS_AT_ONCE
from cdpo_ray.prompts.rows import Columns, Row


def read_file(path: Path, column: str) -> list[str]:
    return [row.prompt for row in files.read_file(path, Columns(column))]


def categories_in(path: Path, category: str | None = None) -> list[str]:
    return [row.category for row in files.read_file(path, Columns("prompt", category))]


def saved(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def faults_of(path: Path, column: str = "prompt") -> list[str]:
    """Each reported fault, without the file's name."""
    with pytest.raises(PromptError, match=r": [\d,]+ fault") as caught:
        read_file(path, column)
    head, *faults = str(caught.value).split("\n")
    assert head.startswith(f"{path}: {len(faults)} fault{'s' * (len(faults) != 1)}") or "the first 10" in head
    assert all(fault.startswith(f"  {path}:") for fault in faults)
    return [fault.removeprefix(f"  {path}:") for fault in faults]


def test_an_unknown_extension_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        PromptError,
        match=r"p\.xml: must end in \.txt, \.csv, \.tsv, \.json, \.jsonl, \.ndjson, \.parquet .*, got '\.xml'",
    ):
        read_file(saved(tmp_path / "p.xml", "[]"), "prompt")
    assert read_file(saved(tmp_path / "P.TXT", "a cat"), "prompt") == ["a cat"]


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_fault_21_a_byte_order_mark_is_ignored(tmp_path: Path, name: str) -> None:
    content = {"p.txt": "a cat\n", "p.csv": "prompt\na cat\n", "p.jsonl": '{"prompt": "a cat"}\n'}[name]
    assert read_file(saved(tmp_path / name, b"\xef\xbb\xbf" + content.encode()), "prompt") == ["a cat"]


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_fault_21_every_line_that_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    line = {"p.txt": "{}", "p.csv": '1,"{}"', "p.jsonl": '{{"prompt": "{}"}}'}[name]
    lines = [line.format(word) for word in ("cat", "café", "naïve", "dog")]
    lines[0] = "id,prompt" if name == "p.csv" else lines[0]
    assert faults_of(saved(tmp_path / name, "\n".join(lines).encode("latin-1"))) == [
        "2: is not UTF-8 (byte 0xe9); save the file as UTF-8",
        "3: is not UTF-8 (byte 0xef); save the file as UTF-8",
    ]


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_fault_21_utf16_is_refused(tmp_path: Path, name: str) -> None:
    assert faults_of(saved(tmp_path / name, "prompt\n".encode("utf-16")))[0] == (
        "1: is not UTF-8 (byte 0xff); save the file as UTF-8"
    )


def test_fault_21_an_unreadable_csv_header_is_the_only_reported_fault(tmp_path: Path) -> None:
    """Without a header, later lines cannot be checked."""
    assert faults_of(saved(tmp_path / "p.csv", 'id,"pro"mpt\n1,a cat\n')) == [
        "1: is not CSV: ',' expected after '\"'; double the quotes in a quoted text, and close it"
    ]


def test_fault_21_a_broken_jsonl_line_is_named_with_file_and_line(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "a cat"}',
        '{"prompt": "a dog"',
        "",
        '"a bird"',
        '{"caption": "a cow", "id": 3}',
        '{"prompt": null}',
        '{"prompt": 3}',
        '{"prompt": ["a", "b"]}',
        '{"prompt": "half \\ud83d"}',
        "[" * 100_000,
        '{"id": ' + "1" * 5000 + "}",
    ]
    faults = faults_of(saved(tmp_path / "p.jsonl", "\n".join(lines)))
    assert faults[:7] == [
        "2: is not JSON: Expecting ',' delimiter at column 19",
        '4: must be an object like {"prompt": "a cat"}, got \'a bird\'',
        "5: has no column `prompt`, got `caption`, `id`; set `column` to one of them",
        "6: `prompt` must be text, got null",
        "7: `prompt` must be text, got 3",
        "8: `prompt` must be text, got ['a', 'b']",
        "9: `prompt` holds half of a surrogate pair ('\\ud83d'); write both halves",
    ]
    assert [fault[:32] for fault in faults[7:]] == [
        "10: is not JSON that can be read",
        "11: is not JSON that can be read",
    ]


def test_fault_21_only_the_first_ten_faults_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    path = saved(tmp_path / "p.jsonl", "{\n" * 1234)
    with pytest.raises(PromptError, match=r"p\.jsonl: 1,234 faults, the first 10\n") as caught:
        read_file(path, "prompt")
    assert [line.split(":")[1] for line in str(caught.value).split("\n")[1:]] == [str(n) for n in range(1, 11)]


def test_json_escapes_are_decoded(tmp_path: Path) -> None:
    prompts = ['a "fox" 🦊', "two\nlines", "nul\x00", "\u2028"]
    text = "".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts)
    assert "\\ud83e" in text
    assert read_file(saved(tmp_path / "p.ndjson", text), "text") == prompts


def test_quoted_csv_fields_may_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    text = 'id, prompt\r\n1, "a cat, a dog"\r\n2,"so called ""art"""\r\n3,"two\nlines"\r\n\r\n5,6" pipe\r\n'
    assert read_file(saved(tmp_path / "p.csv", text), "prompt") == [
        "a cat, a dog",
        'so called "art"',
        "two\nlines",
        "",
        '6" pipe',
    ]


@given(st.lists(st.text(alphabet='ab,"\n\r \x00é🦊', max_size=8), max_size=6))
def test_output_of_a_csv_writer_is_read_back_with_the_first_line_of_each_record(prompts: list[str]) -> None:
    written, starts = io.StringIO(newline=""), []
    writer = csv.writer(written)
    writer.writerow(["id", "prompt"])
    for prompt in prompts:
        starts.append(str(len(re.findall(r"\r\n|\r|\n", written.getvalue())) + 1))
        writer.writerow([1, prompt])
    found = list(read_csv(io.BytesIO(written.getvalue().encode()), Columns("prompt")))
    assert [place for place, _ in found] == starts
    assert [row.prompt.strip() for _, row in found if isinstance(row, Row)] == [prompt.strip() for prompt in prompts]


def test_fault_21_a_faulty_csv_record_is_named_by_its_first_line(tmp_path: Path) -> None:
    lines = [
        "id,prompt",
        '1,"over',
        "three",
        'lines"',
        "2,a cat, a dog",
        "3",
        '4,"a "red" cat"',
        "5,fine",
        '6,"never closed',
        "7,swallowed",
    ]
    advice = "double the quotes in a quoted text, and close it"
    assert faults_of(saved(tmp_path / "p.csv", "\n".join(lines) + "\n")) == [
        "5: must have 2 fields as the header, got 3; quote text that holds commas",
        "6: must have 2 fields as the header, got 1; quote text that holds commas",
        f"7: is not CSV: ',' expected after '\"'; {advice}",
        f"9: is not CSV: unexpected end of data; {advice}",
    ]


@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
def test_fault_21_a_missing_column_is_reported_with_the_existing_ones(tmp_path: Path, name: str) -> None:
    if name == "p.csv":
        saved(tmp_path / name, "id,caption\n1,a cat\n")
    else:
        pq.write_table(pa.table({"id": [1], "caption": ["a cat"]}), tmp_path / name)
    with pytest.raises(PromptError, match=r"has no column `prompt`, got `id`, `caption`; set `column` to one of them$"):
        read_file(tmp_path / name, "prompt")
    assert read_file(tmp_path / name, "caption") == ["a cat"]


def test_fault_21_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"p\.csv: has column `prompt` twice"):
        read_file(saved(tmp_path / "p.csv", "prompt,prompt\na,b\n"), "prompt")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["prompt"] * 2), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=r"p\.parquet: has column `prompt` twice"):
        read_file(tmp_path / "p.parquet", "prompt")


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1], "int64"), ([["a"]], "list<element: string>"), ([{"a": "b"}], "struct<a: string>"), ([b"a"], "binary")],
)
def test_fault_21_a_parquet_column_of_anything_but_text_is_refused(
    tmp_path: Path, values: list[object], kind: str
) -> None:
    pq.write_table(pa.table({"prompt": values}), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=f"`prompt` must be one column of text, got {kind}; set `column` to another"):
        read_file(tmp_path / "p.parquet", "prompt")


def test_fault_21_missing_and_undecodable_parquet_values_are_named_with_their_row(tmp_path: Path) -> None:
    words = [b"fine"] * (ROWS_AT_ONCE + 5)
    words[2], words[ROWS_AT_ONCE + 1] = b"caf\xe9", None  # type: ignore[call-overload]
    column = pa.array(words, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    assert faults_of(tmp_path / "p.parquet") == [
        "row 3: is not UTF-8 (byte 0xe9); save the file as UTF-8",
        f"row {ROWS_AT_ONCE + 2}: `prompt` must be text, got null",
    ]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str
)
def test_every_parquet_type_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"prompt": pa.array(["a 🦊", "", "a 🦊"]).cast(kind)}), tmp_path / "p.parquet")
    assert read_file(tmp_path / "p.parquet", "prompt") == ["a 🦊", "", "a 🦊"]


@pytest.mark.parametrize("cut", [0, 3, 100, -9])
def test_fault_21_a_truncated_parquet_file_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    pq.write_table(pa.table({"prompt": ["a cat"]}), tmp_path / "whole.parquet")
    path = saved(tmp_path / "p.parquet", (tmp_path / "whole.parquet").read_bytes()[:cut])
    with pytest.raises(PromptError, match=r"p\.parquet: cannot be read as Parquet: "):
        read_file(path, "prompt")


def test_fault_21_a_damaged_parquet_page_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": [f"prompt {n}" for n in range(1000)]}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[4:12] = b"\xff" * 8  # where the first page's header is
    with pytest.raises(PromptError, match=r"p\.parquet: cannot be read as Parquet: "):
        read_file(saved(path, bytes(content)), "prompt")


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def test_fault_23_pickled_parquet_columns_are_refused_by_their_type_and_nothing_is_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    bomb = pickle.dumps(_Bomb(mark))
    pickle.loads(bomb)  # noqa: S301 - the bomb is one
    assert mark.exists()
    mark.unlink()
    tensor = {b"ARROW:extension:name": b"ray.data.arrow_tensor", b"ARROW:extension:metadata": bomb}
    objects = {b"ARROW:extension:name": b"ray.data.arrow_pickled_object", b"ARROW:extension:metadata": bomb}
    kinds = {
        "binary": pa.field("prompt", pa.binary()),
        "tensor": pa.field("prompt", pa.list_(pa.binary()), metadata=tensor),
        "objects": pa.field("prompt", pa.large_binary(), metadata=objects),
    }
    for name, field in kinds.items():
        values = pa.array([[bomb]] if name == "tensor" else [bomb], field.type)
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_arrays([values], schema=pa.schema([field])), path)
        # If Ray is imported, its tensor type refuses a pickled shape before we inspect the type.
        with pytest.raises(
            PromptError, match=r"must be one column of text, got .+; set|as Parquet: Unable to deserialize shape"
        ):
            read_file(path, "prompt")
        assert not mark.exists()
    beside = pa.schema([pa.field("prompt", pa.string()), kinds["objects"].with_name("image")])
    columns = [pa.array(["a cat"]), pa.array([bomb], pa.large_binary())]
    pq.write_table(pa.Table.from_arrays(columns, schema=beside), path)
    assert read_file(path, "prompt") == ["a cat"]
    assert not mark.exists()


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path: Path) -> None:
    """Their pages are overwritten, without any error."""
    path = tmp_path / "p.parquet"
    table = pa.table({"image": [bytes(1000)] * 100, "prompt": [f"prompt {n}" for n in range(100)]})
    pq.write_table(table, path, use_dictionary=False, compression="none")
    image = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start, size = image.data_page_offset, image.total_compressed_size
    content[start : start + size] = struct.pack("B", 255) * size
    assert read_file(saved(path, bytes(content)), "prompt") == table["prompt"].to_pylist()
    with pytest.raises(OSError, match="thrift"):
        pq.read_table(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "prompt;category\na cat, asleep;x\na dog;y\n"),
        ("p.csv", "sep=;\r\nprompt;category\r\na cat, asleep;x\r\na dog;y"),
        ("p.csv", '"sep=|"\nid|Prompt\n1|a cat, asleep\n2|a dog\n'),
        ("p.csv", 'category\tprompt\nx\t"a cat, asleep"\ny\ta dog\n'),
        ("p.csv", 'PROMPT ,category\n"a cat, asleep",x\na dog,y\n'),
        ("p.tsv", "Prompt\tCategory\na cat, asleep\tx\na dog\ty\n"),
        ("p.tsv", "prompt\na cat, asleep\na dog\n"),
        ("p.json", '["a cat, asleep", "a dog"]'),
        ("p.json", '[\n  {"prompt": "a cat, asleep"},\n  {"id": 2, "Prompt": "a dog"}\n]\n'),
        ("p.json", '{"prompt": "a cat, asleep"}\n{"prompt": "a dog"}\n'),
        ("p.jsonl", '{"Prompt": "a cat, asleep"}\n{"prompt": "a dog"}\n'),
        ("P.TXT", "a cat, asleep\r\na dog\r\n"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_as_people_and_programs_write_them_are_read(tmp_path: Path, name: str, text: str, ending: str) -> None:
    content = b"\xef\xbb\xbf" + text.encode()
    path = saved(tmp_path / f"{name}{ending}", gzip.compress(content) if ending else content)
    assert read_file(path, "prompt") == ["a cat, asleep", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.csv",
            "text;category\na cat;x\n",
            r"has no column `prompt`, got `text`, `category`; set `column` to one of them",
        ),
        ("p.csv", "Prompt,PROMPT\na,b\n", r"has column `prompt` twice; remove one"),
        ("p.json", '{"prompts": ["a cat"]}', r"must be a list of texts, .*, got an object with the keys \['prompts'\]"),
        ("p.json", '["a cat"', r"is not JSON: Expecting ',' delimiter at line 1, column 9"),
        ("p.json", "[" * 100_000, r"is not JSON that can be read"),
        (
            "p.json",
            '["a cat", 3, {"text": "a dog"}, "half \\ud83d", "half \\udc80"]',
            r"4 faults\n.*item 2: must be an object.*\n.*item 3",
        ),
        ("p.json", b'["caf\xe9"]', r"p\.json: is not UTF-8 \(byte 0xe9\); save the file"),
        ("p.csv", "sep=;\nprompt;id\na cat;1\na;b;c\n", r"p\.csv:4: must have 2 fields as the header, got 3"),
        ("p.txt.gz", b"not packed", r"p\.txt\.gz: cannot be decompressed: Not a gzipped file"),
        (
            "p.txt.gz",
            gzip.compress(b"a cat\n" * 1000, mtime=0)[:-9],
            r"p\.txt\.gz: cannot be decompressed: .*end-of-stream",
        ),
    ],
)
def test_fault_21_a_file_that_is_not_a_list_of_prompts_is_refused_with_its_content(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        read_file(saved(tmp_path / name, content), "prompt")


def test_every_format_reads_an_empty_file_of_its_kind_as_no_prompts(tmp_path: Path) -> None:
    empty = {ending: b"[]" if ending == ".json" else b"" for ending in FORMATS if ending != ".parquet"}
    for ending, content in empty.items():
        assert read_file(saved(tmp_path / f"p{ending}", content), "prompt") == []
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "p.parquet")
    assert read_file(tmp_path / "p.parquet", "prompt") == []


TABLES = {
    "p.csv": "Prompt,Category,level\na cat, Animals ,3\na dog,,10\n",
    "p.tsv": "prompt\tcategory\tlevel\na cat\tAnimals\t3\na dog\t\t10\n",
    "p.jsonl": '{"prompt": "a cat", "category": "Animals", "level": 3}\n{"prompt": "a dog", "level": 10}\n',
    "p.json": '[{"prompt": "a cat", "category": "Animals", "level": 3}, {"prompt": "a dog", "level": 10}]',
}


@pytest.mark.parametrize("name", [*TABLES, "p.parquet"])
def test_a_column_of_categories_is_read_beside_the_prompts(tmp_path: Path, name: str) -> None:
    if name == "p.parquet":
        columns = {"prompt": ["a cat", "a dog"], "category": ["Animals", None], "level": [3, 10]}
        pq.write_table(pa.table(columns), tmp_path / name)
    else:
        saved(tmp_path / name, TABLES[name])
    assert categories_in(tmp_path / name) == ["Animals", ""], "`category` is read without being named"
    has_types = not name.endswith("sv")
    assert categories_in(tmp_path / name, "level") == (["level 3", "level 10"] if has_types else ["3", "10"])


def test_lists_and_plain_text_have_no_categories(tmp_path: Path) -> None:
    assert categories_in(saved(tmp_path / "p.json", '["a cat"]')) == [""]
    assert categories_in(saved(tmp_path / "p.txt", "a cat\n")) == [""]


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.parquet"])
def test_fault_21_a_missing_column_of_categories_is_refused_if_it_is_named(tmp_path: Path, name: str) -> None:
    if name == "p.parquet":
        pq.write_table(pa.table({"prompt": ["a cat"]}), tmp_path / name)
    else:
        saved(tmp_path / name, {"p.csv": "prompt\na cat\n", "p.jsonl": '{"prompt": "a cat"}'}[name])
    assert categories_in(tmp_path / name) == [""]
    with pytest.raises(PromptError, match="has no column `kind`, got `prompt`; set `category_column` to one of them"):
        categories_in(tmp_path / name, "kind")


def test_fault_21_categories_that_are_neither_text_nor_whole_numbers_are_refused_if_they_are_named(
    tmp_path: Path,
) -> None:
    path = saved(tmp_path / "p.jsonl", '{"prompt": "a cat", "category": ["x"]}\n{"prompt": "a dog", "category": true}')
    assert categories_in(path) == ["", ""]
    with pytest.raises(PromptError, match=r"2 faults\n.*jsonl:1: `category` must be text, got \['x'\]\n.*got True"):
        categories_in(path, "category")
    pq.write_table(pa.table({"prompt": ["a cat"], "category": [["x"]]}), tmp_path / "p.parquet")
    assert categories_in(tmp_path / "p.parquet") == [""]
    with pytest.raises(PromptError, match="`category` must be a column of text or whole numbers, got list"):
        categories_in(tmp_path / "p.parquet", "category")


def test_fault_21_a_category_that_is_not_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    words = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a cat"], "category": words}), tmp_path / "p.parquet")
    with pytest.raises(PromptError, match=r"row 1: is not UTF-8 \(byte 0xe9\)"):
        categories_in(tmp_path / "p.parquet")
    with pytest.raises(PromptError, match="`category` holds half of a surrogate pair"):
        categories_in(saved(tmp_path / "p.jsonl", '{"prompt": "a cat", "category": "\\ud83d"}'))


def test_quotes_in_a_tsv_file_without_quoting_are_part_of_the_text(tmp_path: Path) -> None:
    lines = [
        "prompt\tcategory",
        '"STOP" painted on a wall\tSigns',
        'a sign with "STOP"\t"Street" signs',
        '"a cat"\tAnimals',
    ]
    path = saved(tmp_path / "p.tsv", "\r\n".join(lines))
    assert read_file(path, "prompt") == ['"STOP" painted on a wall', 'a sign with "STOP"', "a cat"]
    assert categories_in(path) == ["Signs", '"Street" signs', "Animals"]
    comma = saved(tmp_path / "p.csv", "prompt,category\n" + '"STOP" painted on a wall,Signs\n')
    with pytest.raises(PromptError, match="is not CSV"):
        read_file(comma, "prompt")

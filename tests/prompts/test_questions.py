"""Files of questions: both layouts, and every fault with its place."""

import json
import os
from pathlib import Path

import pytest

from cdpo_ray.errors import PromptError
from cdpo_ray.prompts.questions import EXAMPLE, VqaQuestion, questions_line, read_questions


def test_questions_are_read_as_they_are_written(tmp_path: Path) -> None:
    path, questions = tmp_path / "q.jsonl", (VqaQuestion("Wie viele Käfer?", "2", "count"), VqaQuestion("Red?", "no"))
    path.write_text("\n" + questions_line("zwei Käfer\u2028", questions) + EXAMPLE, "utf-8")
    assert read_questions(path) == {
        "zwei Käfer\u2028": questions,
        "two cats": (VqaQuestion("How many cats?", "2", "count"),),
    }


def test_lines_of_geneval2_are_read(tmp_path: Path) -> None:
    path = tmp_path / "geneval2.jsonl"
    pairs = [["How many pigs are in the image?", "one"], ["Is the pig green?", "Yes"]]
    row = {"prompt": "a green pig", "atom_count": 2, "vqa_list": pairs, "skills": ["count", "attribute"]}
    path.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "a pig", "vqa_list": pairs[:1]}))
    assert read_questions(path) == {
        "a green pig": (VqaQuestion(*pairs[0], "count"), VqaQuestion(*pairs[1], "attribute")),
        "a pig": (VqaQuestion(*pairs[0]),),
    }


def test_all_faults_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    one = '{"question": "Red?", "answer": "no"}'
    lines = [
        EXAMPLE,
        "{",
        "[1]",
        '{"questions": [ONE]}'.replace("ONE", one),
        '{"prompt": "a", "questions": []}',
        '{"prompt": "b", "questions": [{"question": "Red?", "answer": 2}]}',
        '{"prompt": "c", "questions": [ONE, {"question": " ", "answer": "2"}]}'.replace("ONE", one),
        EXAMPLE,
        '{"prompt": "d", "vqa_list": [["Red?"], 3]}',
        "[" * 100_000,
    ]
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}')
    with pytest.raises(PromptError) as refused:
        read_questions(path)
    first, *faults = str(refused.value).split("\n")
    assert first == f"{path}: 10 faults"
    assert [int(fault.split(":")[1]) for fault in faults] == list(range(2, 12))
    for fault, reason in zip(
        faults,
        ["is not JSON", "dictionary", "`prompt`", "`questions`", "`questions.0.answer`", "`questions.1.question`",
         "has the prompt 'two cats' again", "`questions.0.answer`", "is not JSON", "is not UTF-8 (byte 0xff)"],
        strict=True,
    ):  # fmt: skip
        assert reason in fault and len(fault) < 500
    assert EXAMPLE in faults[0]


def test_a_line_that_was_cut_off_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path, line = tmp_path / "q.jsonl", questions_line("a cat", [VqaQuestion("Cats?", "1")])
    path.write_text(EXAMPLE + "\n" + line[: len(line) // 2])
    with pytest.raises(PromptError, match=r":2: is not JSON: .*; delete a line that was cut off: `cdpo questions`"):
        read_questions(path)


def test_a_missing_file_a_folder_and_a_pipe_are_refused_with_what_to_give(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "none.jsonl", tmp_path, tmp_path / "pipe"):
        with pytest.raises(PromptError, match=f"^{place}: cannot be read: .*; give a JSONL file with lines like"):
            read_questions(place)

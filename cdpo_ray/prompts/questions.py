"""File of questions about the images of prompts: read from untrusted JSON lines, and written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from cdpo_ray.errors import PromptError, printable
from cdpo_ray.prompts.faults import FileFaults, undecoded
from cdpo_ray.store import refuse_special_file

MAX_FILE_BYTES = 2**28
KINDS = ("object", "count", "colour", "position", "relation")
EXAMPLE = '{"prompt": "two cats", "questions": [{"question": "How many cats?", "answer": "2", "kind": "count"}]}'


class VqaQuestion(NamedTuple):
    """A question about an image of a prompt.

    Attributes:
        answer: the right answer.
        kind: subject of the question, such as one of `KINDS`; empty: not stated.
    """

    question: str
    answer: str
    kind: str = ""


_Text = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"\S")]


class _Question(BaseModel):
    question: _Text
    answer: _Text
    kind: Annotated[str, Field(max_length=100)] = ""


class _Questions(BaseModel):
    questions: Annotated[list[_Question], Field(min_length=1, max_length=100)]


class _Row(_Questions):
    prompt: Annotated[str, Field(min_length=1)]


def read_questions(path: Path) -> dict[str, tuple[VqaQuestion, ...]]:
    """Questions by prompt.

    A line is as `EXAMPLE`, or as those of GenEval2: ``prompt``, ``vqa_list`` (pairs of question and answer) and, as
    kinds, ``skills``. Other keys are ignored, and so are empty lines.

    Raises:
        PromptError: the file cannot be read, or has faults, all of which are listed.
    """
    found: dict[str, tuple[VqaQuestion, ...]] = {}
    faults = FileFaults(path)
    try:
        refuse_special_file(path)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise PromptError(f"{path}: must have at most {MAX_FILE_BYTES:,} bytes; split it")
        lines = path.read_text("utf-8-sig", "surrogateescape").split("\n")
    except OSError as error:
        raise PromptError(
            f"{path}: cannot be read: {error.strerror}; give a JSONL file with lines like {EXAMPLE}, or let"
            " `cdpo questions` write it"
        ) from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if fault := undecoded(line):
                raise fault
            prompt, questions = _row(line)
            if prompt in found:
                raise PromptError(
                    f"has the prompt {printable(repr(prompt))} again; put all of its questions in one line"
                )
            found[prompt] = questions
        except PromptError as fault:
            faults.add(str(number), fault)
    faults.refuse()
    return found


def parsed_questions(text: str) -> tuple[VqaQuestion, ...]:
    """Questions that a model wrote: a JSON object with the key ``questions``; text around the object is ignored.

    Raises:
        PromptError: there is no such object.
    """
    return _validated(_Questions, _json(text[text.find("{") : text.rfind("}") + 1]))[1]


def questions_line(prompt: str, questions: Sequence[VqaQuestion]) -> str:
    """A prompt's questions as a line of the file, with its end."""
    row = {
        "prompt": prompt,
        "questions": [{"question": each.question, "answer": each.answer, "kind": each.kind} for each in questions],
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _row(line: str) -> tuple[str, tuple[VqaQuestion, ...]]:
    found = _json(line, "; delete a line that was cut off: `cdpo questions` writes it again")
    if isinstance(found, dict) and "questions" not in found and isinstance(found.get("vqa_list"), list):
        pairs = [pair if isinstance(pair, list) else [pair] for pair in found["vqa_list"]]
        rows = [dict(zip(("question", "answer"), pair, strict=False)) for pair in pairs]
        skills = found.get("skills")
        if isinstance(skills, list) and len(skills) == len(rows):
            rows = [row | {"kind": skill} for row, skill in zip(rows, skills, strict=True)]
        found = {"prompt": found.get("prompt"), "questions": rows}
    return _validated(_Row, found)


def _json(text: str, hint: str = "") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"is not JSON: {printable(error)}; a line must be like {EXAMPLE}{hint}") from None


def _validated(kind: type[_Questions], found: Any) -> tuple[str, tuple[VqaQuestion, ...]]:
    try:
        row = kind.model_validate(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"`{where}`: {first['msg']}" if where else first["msg"]
        raise PromptError(f"{printable(reason)}; a line must be like {EXAMPLE}") from None
    questions = tuple(VqaQuestion(each.question, each.answer, each.kind) for each in row.questions)
    return getattr(row, "prompt", ""), questions

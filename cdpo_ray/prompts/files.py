"""Prompt file -> its prompts as they are written, or every line that is broken."""

import csv
import io
import json
import reprlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cdpo_ray.errors import PromptError
from cdpo_ray.prompts.faults import FileFaults, missing_column, not_text, undecoded
from cdpo_ray.prompts.parquet import read_parquet
from cdpo_ray.store import refuse_special_file

Entries = Iterator[tuple[str, str | PromptError]]
"""Place and prompt, or place and what is wrong there."""


def read_file(path: Path, column: str) -> list[str]:
    """All prompts of a file in its order, empty and doubled ones too; a reader of `FORMATS` by its ending.

    Args:
        column: of the file that holds the prompts; plain text has none.

    Raises:
        PromptError: the ending is unknown, or with all broken lines of the file at once.
        OSError: the file cannot be opened, or is no regular file.
    """
    refuse_special_file(path)
    read = FORMATS.get(path.suffix.lower())
    if read is None:
        endings = ", ".join(filter(None, FORMATS))
        raise PromptError(f"{path}: must end in {endings} (or in nothing: plain text), got {path.suffix!r}")
    prompts, faults = [], FileFaults(path)
    with path.open("rb") as handle:
        try:
            for place, prompt in read(handle, column):
                fault = undecoded(prompt) if isinstance(prompt, str) else prompt
                if fault:
                    faults.add(place, fault)
                else:
                    prompts.append(str(prompt))
        except PromptError as error:
            raise PromptError(f"{path}: {error}") from None
    faults.refuse()
    return prompts


def read_text(handle: BinaryIO, column: str) -> Entries:
    """A prompt a line; there are no columns."""
    for number, line in enumerate(_decoded(handle), start=1):
        yield str(number), line.removesuffix("\n")


def read_csv(handle: BinaryIO, column: str) -> Entries:
    """The field of each record under the header's ``column``; a record's place is the line that it begins on.

    Raises:
        PromptError: the header does not have the column once.
    """
    header: list[str] | None = None
    for place, record in _csv_records(handle):
        if isinstance(record, PromptError):
            yield place, record
            if header is None:
                return
        elif header is None:
            header = [name.strip() for name in record]
            if header.count(column) != 1:
                raise PromptError(f"has `{column}` twice") if column in header else missing_column(column, header)
        elif not record:
            yield place, ""
        elif len(record) != len(header):
            reason = f"has {len(record)} fields, but the header {len(header)}; quote a text that holds commas"
            yield place, PromptError(reason)
        else:
            yield place, record[header.index(column)]


def read_jsonl(handle: BinaryIO, column: str) -> Entries:
    """The value under ``column`` of the object on each line."""
    for number, line in enumerate(_decoded(handle), start=1):
        yield str(number), undecoded(line) or _json_prompt(line.removesuffix("\n"), column)


FORMATS: dict[str, Callable[[BinaryIO, str], Entries]] = {
    "": read_text,
    ".txt": read_text,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
"""Ending of a file -> its reader."""


def _decoded(handle: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    """Text without its byte order mark; what is not UTF-8 is kept for `undecoded` to find."""
    return io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _csv_records(handle: BinaryIO) -> Iterator[tuple[str, list[str] | PromptError]]:
    records = csv.reader(_decoded(handle, newline=""), strict=True, skipinitialspace=True)
    while True:
        place = str(records.line_num + 1)
        try:
            record = next(records, None)
        except csv.Error as error:
            yield place, PromptError(f"is not CSV: {error}; double the quotes in a quoted text, and close it")
            continue
        if record is None:
            return
        yield place, undecoded("".join(record)) or record


def _json_prompt(line: str, column: str) -> str | PromptError:
    if not line.strip():
        return ""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        return PromptError(f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists within lists within ...
        return PromptError(f"is not JSON that can be read: {error}")
    if not isinstance(found, dict):
        return PromptError(f'must be an object like {{"{column}": "a cat"}}, got {reprlib.repr(found)}')
    if column not in found:
        return missing_column(column, found)
    prompt = found[column]
    if not isinstance(prompt, str):
        return not_text(column, prompt)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return PromptError(f"`{column}` holds half of a character ({prompt[error.start]!r}); write both halves")
    return prompt

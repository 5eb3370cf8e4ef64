"""Prompt file -> its prompts, unchanged, or an error about all of its faulty lines."""

import csv
import functools
import gzip
import io
import itertools
import json
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from cdpo_ray.errors import PromptError
from cdpo_ray.prompts.faults import FileFaults, column_of, not_text, undecoded
from cdpo_ray.prompts.parquet import read_parquet
from cdpo_ray.prompts.rows import Columns, Row
from cdpo_ray.store import refuse_special_file

Entries = Iterator[tuple[str, Row | PromptError]]
"""Pairs of a place in the file and the row or the fault there."""

DELIMITERS = (",", ";", "\t", "|")
EXCEL_SEPARATOR = re.compile(r'^"?sep=([^"\r\n])"?\r?\n?$', re.IGNORECASE)
"""First line with which a file states its delimiter to Excel."""


def read_file(path: Path, columns: Columns) -> list[Row]:
    """All prompts of a file in order, including empty and duplicate ones.

    The extension selects the reader, see `FORMATS`; files with a further extension ``.gz`` are decompressed.

    Args:
        columns: ignored for plain text.

    Raises:
        PromptError: the extension is unknown, or the file has faults, all of which are listed.
        OSError: the file cannot be opened, or is not a regular file.
    """
    refuse_special_file(path)
    is_packed = path.suffix.lower() == ".gz"
    ending = Path(path.stem if is_packed else path.name).suffix.lower()
    rows, faults = list[Row](), FileFaults(path)
    with cast(BinaryIO, gzip.open(path) if is_packed else path.open("rb")) as handle:
        read = FORMATS.get(ending)
        if read is None:
            endings = ", ".join(filter(None, FORMATS))
            raise PromptError(f"{path}: must end in {endings} (or have no extension: plain text), got {ending!r}")
        try:
            for place, row in read(handle, columns):
                fault = row if isinstance(row, PromptError) else undecoded("".join(row))
                if fault:
                    faults.add(place, fault)
                else:
                    rows.append(cast(Row, row))
        except PromptError as error:
            raise PromptError(f"{path}: {error}") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise PromptError(f"{path}: cannot be decompressed: {error}; download or write it again") from None
    faults.refuse()
    return rows


def read_text(handle: BinaryIO, columns: Columns) -> Entries:
    """One prompt per line; there are no columns."""
    for number, line in enumerate(_decoded(handle), start=1):
        yield str(number), Row(line.removesuffix("\n"))


def read_csv(handle: BinaryIO, columns: Columns, delimiters: tuple[str, ...] = DELIMITERS) -> Entries:
    """The fields of each record in ``columns``; a record's place is its first line.

    Args:
        delimiters: candidates; the first by which the header has the column is used, unless Excel's first line names
            one.

    Raises:
        PromptError: the header does not have a column exactly once.
    """
    header: list[str] | None = None
    for place, record in csv_records(handle, functools.partial(_has_columns, columns), delimiters):
        if isinstance(record, PromptError):
            yield place, record
            if header is None:
                return
        elif header is None:
            header = [name.strip() for name in record]
            column, category = columns.within(header)
        elif not record:
            yield place, Row("")
        elif len(record) != len(header):
            reason = f"must have {len(header)} fields as the header, got {len(record)}; quote text that holds commas"
            yield place, PromptError(reason)
        else:
            found = dict(zip(header, record, strict=True))
            yield place, columns.row(found[column], found.get(category or ""), category)


def read_jsonl(handle: BinaryIO, columns: Columns) -> Entries:
    """One JSON object per line, with the columns as keys."""
    for number, line in enumerate(_decoded(handle), start=1):
        yield str(number), undecoded(line) or _json_row(line.removesuffix("\n"), columns)


def read_json(handle: BinaryIO, columns: Columns) -> Entries:
    """A list of texts, or of objects with the columns as keys; JSON lines are read as by `read_jsonl`.

    Raises:
        PromptError: the file is not a list, or not UTF-8.
    """
    text = _decoded(handle).read()
    if fault := undecoded(text):
        raise fault
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise PromptError(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
        yield from read_jsonl(io.BytesIO(text.encode()), columns)
        return
    except (ValueError, RecursionError) as error:
        raise PromptError(f"is not JSON that can be read: {error}") from None
    if not isinstance(found, list):
        raise PromptError(
            f'must be a list of texts, or of objects like {{"{columns.prompt}": "a cat"}}, got {_shown(found)}'
        )
    for number, item in enumerate(found, start=1):
        row = (_half(item, "it") or Row(item)) if isinstance(item, str) else _row_in(item, columns)
        yield f"item {number}", row


FORMATS: dict[str, Callable[[BinaryIO, Columns], Entries]] = {
    "": read_text,
    ".txt": read_text,
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, delimiters=("\t",)),
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".parquet": read_parquet,
}
"""File extension -> reader."""


def _decoded(handle: BinaryIO, newline: str | None = None) -> io.TextIOWrapper:
    """Text without its byte order mark; bytes that are not UTF-8 are kept for `undecoded` to find."""
    return io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def csv_records(
    handle: BinaryIO, num_known: Callable[[list[str]], int], delimiters: Sequence[str]
) -> Iterator[tuple[str, list[str] | PromptError]]:
    """Place and fields of each record of a text table, the header first; a place is a record's first line.

    Args:
        num_known: number of columns in a header that the caller knows.
        delimiters: candidates; the one by which the header has most known columns is used, unless Excel's first line
            names one.

    Tabs separate without quoting, too (as text/tab-separated-values has it): a line of such a table that is not
    validly quoted is split literally.
    """
    lines, num_before = _decoded(handle, newline=""), 0
    first = lines.readline()
    if named := EXCEL_SEPARATOR.match(first):
        first, num_before, delimiters = lines.readline(), 1, (named[1],)
    delimiter = max(delimiters, key=lambda each: (num_known(_header(first, each)), first.count(each)))
    taken: list[str] = []  # lines of the current record

    def taking() -> Iterator[str]:
        for line in itertools.chain([first] if first else [], lines):
            taken.append(line)
            yield line

    records = csv.reader(taking(), delimiter=delimiter, strict=True, skipinitialspace=True)
    while True:
        place = str(records.line_num + num_before + 1)
        taken.clear()
        try:
            record = next(records, None)
        except csv.Error as error:
            if delimiter == "\t" and len(taken) == 1:
                line = taken[0].rstrip("\r\n")
                yield place, undecoded(line) or line.split("\t")
                continue
            yield place, PromptError(f"is not CSV: {error}; double the quotes in a quoted text, and close it")
            continue
        if record is None:
            return
        yield place, undecoded("".join(record)) or record


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])]
    except csv.Error:
        return []


def _has_columns(columns: Columns, header: list[str]) -> bool:
    try:
        column_of(columns.prompt, header)
    except PromptError:
        return False
    return True


def _json_row(line: str, columns: Columns) -> Row | PromptError:
    if not line.strip():
        return Row("")
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        return PromptError(f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of too many digits, lists within lists within ...
        return PromptError(f"is not JSON that can be read: {error}")
    return _row_in(found, columns)


def _row_in(found: Any, columns: Columns) -> Row | PromptError:
    if not isinstance(found, dict):
        return PromptError(f'must be an object like {{"{columns.prompt}": "a cat"}}, got {_shown(found)}')
    try:
        column, category = columns.within(list(found))
    except PromptError as error:
        return error
    prompt, label = found[column], found.get(category or "")
    if not isinstance(prompt, str):
        return not_text(column, prompt)
    fault = _half(prompt, f"`{column}`") or (_half(label, f"`{category}`") if isinstance(label, str) else None)
    return fault or columns.row(prompt, label, category)


def _half(text: str, name: str) -> PromptError | None:
    """The fault of a text that cannot be encoded; ``None``: it can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return PromptError(f"{name} holds half of a surrogate pair ({text[error.start]!r}); write both halves")
    return None


def _shown(found: Any) -> str:
    return f"an object with the keys {reprlib.repr(list(found))}" if isinstance(found, dict) else reprlib.repr(found)

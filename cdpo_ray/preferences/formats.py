"""What preference files call their columns, and what to do with files of another kind."""

import csv
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.values import shown

COLUMNS_SHOWN = 20
CHARACTERS_LOOKED_AT = 1_000_000
"""Of a file of another kind, to name its columns."""

HEADER_LOOKED_AT = 100_000


@dataclass(frozen=True)
class Columns:
    """What a format calls its columns.

    Attributes:
        labels: none: the first image is the preferred one.
        scores, ranks: of the two images, if the file has them and they are asked for.
        has_label: false in rows that nobody judged.
    """

    prompt: str
    images: tuple[str, str]
    labels: tuple[str, str] | None
    scores: tuple[str, str]
    ranks: tuple[str, str]
    has_label: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        has_label = (self.has_label,) if self.has_label else ()
        return (*self.required, *self.scores, *self.ranks, *has_label)

    @property
    def required(self) -> tuple[str, ...]:
        return (self.prompt, *self.images, *(self.labels or ()))


FORMATS: dict[str, Columns | None] = {
    "pickapic": Columns(
        "caption",
        ("jpg_0", "jpg_1"),
        ("label_0", "label_1"),
        ("score_0", "score_1"),
        ("rank_0", "rank_1"),
        "has_label",
    ),
    "pairs": Columns(
        "prompt",
        ("chosen", "rejected"),
        None,
        ("chosen_score", "rejected_score"),
        ("chosen_rank", "rejected_rank"),
    ),
    "ranked_folders": None,
}
"""A folder a prompt has no columns: `prompt.txt`, and images whose names begin with their rank, 0 the best."""

TABLES = (".parquet", ".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
"""Endings of files that are read, in lower case."""

_TO_JSONL = 'import pandas; pandas.read_csv({name}, sep="{separator}").to_json({to}, orient="records", lines=True)'
_TO_PARQUET = "import datasets; datasets.load_from_disk({name}).to_parquet({to})"
_TO_SMALL_ROW_GROUPS = (
    "import pyarrow.parquet as pq; f = pq.ParquetFile({name}); w = pq.ParquetWriter({to}, f.schema_arrow);"
    " [w.write_batch(b) for b in f.iter_batches(256)]; w.close()"
)


def is_table(path: Path) -> bool:
    return path.name.lower().endswith(TABLES)


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def missing_columns(path: Path, absent: Sequence[str], there: Iterable[str]) -> PreferenceError:
    """The error of a table that lacks columns: names those that are there, and the format that they fit best."""
    there = list(there)
    fits = any(_fits(name, there) for name in FORMATS)
    advice = _nearest(there) if fits else "; say in `preferences.columns` what they are called"
    return PreferenceError(f"{path}: has no column {', '.join(map(shown, absent))}, but {_listed(there)}{advice}")


def other_kind(path: Path) -> PreferenceError:
    """The error of a file that is no table: what it is, and how it is made one."""
    to = f"{path.name.partition('.')[0]}.jsonl"
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        separator = {".csv": ",", ".tsv": "\t"}[ending]
        header = _beginning(path).partition("\n")[0][:HEADER_LOOKED_AT].rstrip("\r")
        columns = next(csv.reader([header], delimiter=separator), [])
        command = _command(_TO_JSONL, name=path.name, to=to, separator=separator.replace("\t", "\\t"))
        what = f"a table of text with the columns {_listed(columns)}{_nearest(columns)}"
        return PreferenceError(f"{path}: is {what}; write it as JSONL: {command}")
    if ending in (".json", ".jsonl", ".ndjson"):
        return _other_json(path, to)
    if ending == ".arrow" and (path.parent / "dataset_info.json").is_file():
        command = _command(_TO_PARQUET, name=path.parent.name, to=f"{path.parent.name}.parquet")
        return PreferenceError(f"{path.parent}: is a folder of `save_to_disk`; write it as Parquet: {command}")
    if path.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip")):
        return PreferenceError(
            f"{path}: is an archive; unpack it, and write a JSONL file beside its images that names them (`prompt`,"
            " `chosen`, `rejected`), or a ranked folder for each prompt"
        )
    return PreferenceError(f"{path}: must end in .parquet, .jsonl or .jsonl.gz, got {path.suffix!r}")


def no_tables(folder: Path, files: Sequence[Path]) -> PreferenceError:
    """The error of a folder in which no file is a table.

    Args:
        files: of the folder and the folders in it.
    """
    if any(path.name == "prompt.txt" for path in files):
        return PreferenceError(f"{folder}: holds a folder for each prompt; give `preferences.format` ranked_folders")
    kinds = (".arrow", ".json", ".csv", ".tsv", ".tar", ".tgz", ".zip", ".gz")
    descriptions = ("dataset_info.json", "state.json", "dataset_dict.json")
    data = [path for path in files if path.suffix.lower() in kinds and path.name not in descriptions]
    if data:
        return other_kind(min(data, key=lambda path: (kinds.index(path.suffix.lower()), path)))
    endings = Counter(path.suffix.lower() for path in files)
    found = ", ".join(f"{number:,} {ending or 'without ending'}" for ending, number in endings.most_common(5))
    return PreferenceError(f"{folder}: holds no .parquet or .jsonl file, but {found or 'nothing'}")


def with_small_row_groups(path: Path) -> str:
    """The command that writes a Parquet file again, with row groups that a task reads with little memory."""
    return _command(_TO_SMALL_ROW_GROUPS, name=path.name, to=f"small-{path.name}")


def _command(code: str, *, name: str, to: str, **values: str) -> str:
    """A line of Python for the shell, in which the names of files are nothing but text."""
    return f"python -c {shlex.quote(code.format(name=json.dumps(name), to=json.dumps(to), **values))}"


def _other_json(path: Path, to: str) -> PreferenceError:
    text = _beginning(path).strip()
    first, is_list = _first_value(text.removeprefix("[")), text.startswith("[")
    columns = list(first) if isinstance(first, dict) else []
    if is_list:
        of = f"objects with {_listed(columns)}{_nearest(columns)}" if columns else "other values"
        advice = f"write one object a line: jq -c '.[]' {shlex.quote(path.name)} > {shlex.quote(to)}"
        return PreferenceError(f"{path}: is a JSON list of {of}; {advice}")
    if columns and "\n" in text:
        return PreferenceError(
            f"{path}: must end in .jsonl if it holds one object a line; its first has {_listed(columns)}"
        )
    return PreferenceError(f"{path}: must hold one object a line and end in .jsonl, got other JSON")


def _first_value(text: str) -> object:
    try:
        return json.JSONDecoder().raw_decode(text.lstrip())[0]
    except (ValueError, RecursionError):
        return None


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
            return handle.read(CHARACTERS_LOOKED_AT)
    except OSError as error:
        raise PreferenceError(f"{path}: cannot be read: {error.strerror}") from None


def _listed(columns: Sequence[str]) -> str:
    more = f", ... ({len(columns):,} in all)" if len(columns) > COLUMNS_SHOWN else ""
    return ", ".join(map(shown, columns[:COLUMNS_SHOWN])) + more or "nothing"


def _fits(name: str, columns: Sequence[str]) -> bool:
    kind = FORMATS[name]
    return kind is not None and {*kind.required} <= {*columns}


def _nearest(columns: Sequence[str]) -> str:
    """The format that the columns fit, or of which most are there."""
    known = {name: kind.required for name, kind in FORMATS.items() if kind}
    num_there = {name: len({*required} & {*columns}) for name, required in known.items()}
    name = max(known, key=lambda name: num_there[name] / len(known[name]))
    if _fits(name, columns):
        return f"; they fit `preferences.format` {name}"
    return f"; `preferences.format` {name} has {', '.join(known[name])}" if num_there[name] else ""

"""Column names of preference formats, and errors for files of other kinds."""

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
MAX_CHARACTERS_READ = 1_000_000
"""Number of characters of an unsupported file that are read to name its columns."""

MAX_HEADER_CHARACTERS = 100_000


@dataclass(frozen=True)
class Columns:
    """Column names of a format.

    Attributes:
        prompt: column of the prompt.
        images: columns of the two images.
        labels: columns of the images' labels; `None`: the first image is preferred.
        scores, ranks: optional columns of the two images' scores and ranks.
        has_label: optional column that is false in unlabelled rows.
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
"""Format -> columns; `None`: one folder per prompt, with `prompt.txt` and images whose names start with their rank,
0 for the best."""

TABLES = (".parquet", ".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
"""Supported file extensions, in lower case."""

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


def missing_columns(path: Path, absent: Sequence[str], present: Iterable[str]) -> PreferenceError:
    """Error for a table that lacks columns: names those that it has, and the format that they fit.

    Args:
        absent: missing columns.
        present: columns of the file.
    """
    present = list(present)
    fits = any(_fits(name, present) for name in FORMATS)
    advice = _nearest(present) if fits else "; give their names in `preferences.columns`"
    return PreferenceError(f"{path}: has no column {', '.join(map(shown, absent))}, got {_listed(present)}{advice}")


def other_kind(path: Path) -> PreferenceError:
    """Error for a file of an unsupported kind: says what it is, and how to convert it."""
    to = f"{path.name.partition('.')[0]}.jsonl"
    extension = path.suffix.lower()
    if extension in (".csv", ".tsv"):
        separator = {".csv": ",", ".tsv": "\t"}[extension]
        header = _beginning(path).partition("\n")[0][:MAX_HEADER_CHARACTERS].rstrip("\r")
        columns = next(csv.reader([header], delimiter=separator), [])
        command = _command(_TO_JSONL, name=path.name, to=to, separator=separator.replace("\t", "\\t"))
        what = f"a text table with columns {_listed(columns)}{_nearest(columns)}"
        return PreferenceError(f"{path}: is {what}; convert it to JSONL: {command}")
    if extension in (".json", ".jsonl", ".ndjson"):
        return _other_json(path, to)
    if extension == ".arrow" and (path.parent / "dataset_info.json").is_file():
        command = _command(_TO_PARQUET, name=path.parent.name, to=f"{path.parent.name}.parquet")
        return PreferenceError(f"{path.parent}: is a `save_to_disk` folder; convert it to Parquet: {command}")
    if path.name.lower().endswith((".tar", ".tar.gz", ".tgz", ".zip")):
        return PreferenceError(
            f"{path}: is an archive; unpack it, and write a JSONL file beside the images that names them (`prompt`,"
            " `chosen`, `rejected`), or one ranked folder per prompt"
        )
    return PreferenceError(f"{path}: must end in .parquet, .jsonl or .jsonl.gz, got {path.suffix!r}")


def no_tables(folder: Path, files: Sequence[Path]) -> PreferenceError:
    """Error for a folder without a supported file.

    Args:
        files: all files in the folder, recursively.
    """
    if any(path.name == "prompt.txt" for path in files):
        return PreferenceError(f"{folder}: holds one folder per prompt; set `preferences.format` to ranked_folders")
    kinds = (".arrow", ".json", ".csv", ".tsv", ".tar", ".tgz", ".zip", ".gz")
    descriptions = ("dataset_info.json", "state.json", "dataset_dict.json")
    data = [path for path in files if path.suffix.lower() in kinds and path.name not in descriptions]
    if data:
        return other_kind(min(data, key=lambda path: (kinds.index(path.suffix.lower()), path)))
    extensions = Counter(path.suffix.lower() for path in files)
    found = ", ".join(f"{count:,} {extension or 'without extension'}" for extension, count in extensions.most_common(5))
    return PreferenceError(f"{folder}: must hold .parquet or .jsonl files, got {found or 'an empty folder'}")


def with_small_row_groups(path: Path) -> str:
    """Command that rewrites a Parquet file with row groups that a task can read in little memory."""
    return _command(_TO_SMALL_ROW_GROUPS, name=path.name, to=f"small-{path.name}")


def _command(code: str, *, name: str, to: str, **values: str) -> str:
    """Shell command that runs a line of Python; file names are quoted as text."""
    return f"python -c {shlex.quote(code.format(name=json.dumps(name), to=json.dumps(to), **values))}"


def _other_json(path: Path, to: str) -> PreferenceError:
    text = _beginning(path).strip()
    first, is_list = _first_value(text.removeprefix("[")), text.startswith("[")
    columns = list(first) if isinstance(first, dict) else []
    if is_list:
        items = f"objects with {_listed(columns)}{_nearest(columns)}" if columns else "other values"
        advice = f"write one object per line: jq -c '.[]' {shlex.quote(path.name)} > {shlex.quote(to)}"
        return PreferenceError(f"{path}: is a JSON list of {items}; {advice}")
    if columns and "\n" in text:
        return PreferenceError(
            f"{path}: must end in .jsonl if it holds one object per line; the first has {_listed(columns)}"
        )
    return PreferenceError(f"{path}: must hold one object per line and end in .jsonl, got other JSON")


def _first_value(text: str) -> object:
    try:
        return json.JSONDecoder().raw_decode(text.lstrip())[0]
    except (ValueError, RecursionError):
        return None


def _beginning(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
            return handle.read(MAX_CHARACTERS_READ)
    except OSError as error:
        raise PreferenceError(f"{path}: cannot be read: {error.strerror}") from None


def _listed(columns: Sequence[str]) -> str:
    more = f", ... ({len(columns):,} in total)" if len(columns) > COLUMNS_SHOWN else ""
    return ", ".join(map(shown, columns[:COLUMNS_SHOWN])) + more or "nothing"


def _fits(name: str, columns: Sequence[str]) -> bool:
    kind = FORMATS[name]
    return kind is not None and {*kind.required} <= {*columns}


def _nearest(columns: Sequence[str]) -> str:
    """Advice that names the format that the columns fit, or the one that shares most columns."""
    known = {name: kind.required for name, kind in FORMATS.items() if kind}
    num_shared = {name: len({*required} & {*columns}) for name, required in known.items()}
    name = max(known, key=lambda name: num_shared[name] / len(known[name]))
    if _fits(name, columns):
        return f"; they fit `preferences.format` {name}"
    return f"; `preferences.format` {name} has {', '.join(known[name])}" if num_shared[name] else ""

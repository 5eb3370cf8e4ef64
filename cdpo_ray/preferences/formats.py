"""Column names of preference formats, and errors for files that do not fit them."""

import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.values import shown

COLUMNS_SHOWN = 20


@dataclass(frozen=True)
class Columns:
    """Column names of a format.

    Values of several images are in one column per image, or in one column of lists. With `group`, each row is one
    image, and the rows with one value of that column are one ranking.

    Attributes:
        prompt: column of the prompt.
        images: columns of the images.
        labels: columns of the images' labels; `None`: the first image is preferred, unless `winner` is given.
        scores, ranks: optional columns of the images' scores and ranks; ranks replace labels that a file lacks.
        has_label: optional column that is false in unlabelled rows.
        winner: column that names the preferred image.
        group: column whose equal values join rows.
        aliases: further names of columns in published files.
        in_folders: each row is a folder; see `RankedFolders`.
    """

    prompt: str
    images: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    scores: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    has_label: str | None = None
    winner: str | None = None
    group: str | None = None
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    in_folders: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, optional ones too."""
        optional = (*self.scores, *self.ranks, *filter(None, [self.has_label]))
        return tuple(dict.fromkeys((*self.required, *optional)))

    @property
    def required(self) -> tuple[str, ...]:
        preference = () if self.labels is None else self.labels or self.ranks
        return (*filter(None, [self.group]), self.prompt, *self.images, *filter(None, [self.winner]), *preference)

    def spellings(self, column: str) -> tuple[str, ...]:
        """Names of a column in files, the usual one first.

        `imagefolder` of `datasets` names the file of an image in ``<column>_file_name``, of a list in
        ``<column>_file_names``. webdataset keeps the text of a sample in `txt`, and may number its images.
        """
        further = self.aliases.get(column, ())
        if column == self.prompt:
            further += ("txt",)
        if column in self.images:
            further += (f"{column}_file_name", f"{column}_file_names")
            further += (str(self.images.index(column)),) if len(self.images) > 1 else ()
        return (column, *further)

    def lacks(self, column: str, present: Collection[str]) -> bool:
        return not any(name in present for name in self.spellings(column))

    def fits(self, present: Collection[str]) -> bool:
        """Whether a file has the required columns; ranks may replace labels."""
        absent = {column for column in self.required if self.lacks(column, present)}
        by_rank = bool(self.ranks) and not any(self.lacks(column, present) for column in self.ranks)
        return absent <= ({*(self.labels or ())} if by_rank else set())


FORMATS: dict[str, Columns] = {
    "pickapic": Columns(
        prompt="caption",
        images=("jpg_0", "jpg_1"),
        labels=("label_0", "label_1"),
        scores=("score_0", "score_1"),
        ranks=("rank_0", "rank_1"),
        has_label="has_label",
        aliases={"caption": ("original_prompt",)},
    ),
    "pairs": Columns(
        prompt="prompt",
        images=("chosen", "rejected"),
        scores=("chosen_score", "rejected_score"),
        ranks=("chosen_rank", "rejected_rank"),
    ),
    "winner": Columns(prompt="prompt", images=("image_a", "image_b"), winner="winner"),
    "hpdv2": Columns(
        prompt="prompt",
        images=("image_path",),
        labels=("human_preference",),
        ranks=("rank",),
        aliases={"image_path": ("file_path",)},
    ),
    "hpdv3": Columns(prompt="prompt", images=("path1", "path2")),
    "image_list": Columns(
        prompt="prompt", images=("images",), labels=("ratings",), ranks=("ranks",), aliases={"images": ("file_names",)}
    ),
    "imagerewarddb": Columns(
        prompt="prompt",
        images=("image",),
        labels=(),
        scores=("overall_rating",),
        ranks=("rank",),
        group="prompt_id",
        aliases={"image": ("image_path", "file_name", "jpg", "jpeg", "png", "webp")},
    ),
    "ranked_folders": Columns(prompt="prompt", images=("images",), labels=("labels",), in_folders=True),
}
"""Format -> columns."""

_TO_SMALL_ROW_GROUPS = (
    "import pyarrow.parquet as pq; f = pq.ParquetFile({name}); w = pq.ParquetWriter({to}, f.schema_arrow);"
    " [w.write_batch(b) for b in f.iter_batches(256)]; w.close()"
)


def missing_columns(path: Path, absent: Sequence[str], present: Iterable[str]) -> PreferenceError:
    """Error for a table that lacks columns: names those that it has, and the format that they fit.

    Args:
        absent: missing columns.
        present: columns of the file.
    """
    present = list(present)
    more = f", ... ({len(present):,} in total)" if len(present) > COLUMNS_SHOWN else ""
    got = ", ".join(map(shown, present[:COLUMNS_SHOWN])) + more or "nothing"
    return PreferenceError(
        f"{path}: has no column {', '.join(map(shown, absent))}, got {got}; {_advice(absent, present)}"
    )


def other_kind(path: Path, endings: str) -> PreferenceError:
    """Error for a file of an unsupported kind.

    Args:
        endings: supported file extensions, for people.
    """
    name = path.name.lower()
    if name.endswith(".zip"):
        return PreferenceError(
            f"{path}: is an archive; unpack it, and give the table that names its images, or write one with `prompt`,"
            " `chosen`, `rejected`"
        )
    if name.endswith((".parquet.gz", ".arrow.gz")):
        return PreferenceError(f"{path}: cannot be read compressed; decompress it: gunzip {shlex.quote(path.name)}")
    return PreferenceError(f"{path}: must end in {endings}, got {path.suffix!r}")


def no_tables(folder: Path, files: Sequence[Path], endings: str) -> PreferenceError:
    """Error for a folder without a supported file.

    Args:
        files: all files in the folder, recursively.
        endings: supported file extensions, for people.
    """
    if any(path.name == "prompt.txt" for path in files):
        return PreferenceError(f"{folder}: holds one folder per prompt; set `preferences.format` to ranked_folders")
    if archives := sorted(path for path in files if path.suffix.lower() in (".zip", ".gz")):
        return other_kind(archives[0], endings)
    extensions = Counter(path.suffix.lower() for path in files)
    found = ", ".join(f"{count:,} {extension or 'without extension'}" for extension, count in extensions.most_common(5))
    return PreferenceError(f"{folder}: must hold files that end in {endings}, got {found or 'an empty folder'}")


def with_small_row_groups(path: Path) -> str:
    """Command that rewrites a Parquet file with row groups that a task can read in little memory."""
    code = _TO_SMALL_ROW_GROUPS.format(name=json.dumps(path.name), to=json.dumps(f"small-{path.name}"))
    return f"python -c {shlex.quote(code)}"


def _advice(absent: Sequence[str], present: Sequence[str]) -> str:
    """Name the format that the columns fit, or ask for their names and name the format that shares most columns."""
    known = {name: columns for name, columns in FORMATS.items() if not columns.in_folders}
    if fitting := [name for name, columns in known.items() if columns.fits(present)]:
        return f"they fit `preferences.format` {' or '.join(fitting)}"
    shared = {
        name: sum(not columns.lacks(column, present) for column in columns.required) / len(columns.required)
        for name, columns in known.items()
    }
    nearest = max(shared, key=lambda name: shared[name])
    advice = "give their names in `preferences.columns`"
    if {*absent} & {*known[nearest].required} or not shared[nearest]:
        return advice
    return f"{advice}, or set `preferences.format` to {nearest}, which has {', '.join(known[nearest].required)}"

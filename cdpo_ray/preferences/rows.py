"""Values of a file's row -> a judged group of images, or the reason why the row is unusable."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from cdpo_ray.errors import PreferenceError, printable
from cdpo_ray.preferences.formats import FORMATS, Columns, missing_columns
from cdpo_ray.preferences.values import image_of, is_false, list_of, number_of, prompt_of, shown, winner_of

MAX_FAULT_SHOWN = 2000  # characters

Numbered = tuple[int, Any]
"""Number of a row or line of a file, from 1, and its values by column name, or a `ValueError` if it is unreadable."""


@dataclass(frozen=True)
class PreferenceSource:
    """Location and format of preference files.

    Attributes:
        path: a file, a folder of them, or a pattern (``data/**/train-*.parquet``); for ``ranked_folders``, their parent
            folder.
        format: key of `FORMATS`.
        columns: column name of the format -> name in the files, for renamed columns.
        difficulty: column that ranks the images: ``label``, the files' ``score`` or ``rank`` (0 is best).
        max_image_bytes: maximum size of a member of an archive; larger ones are not read.
    """

    path: str
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    difficulty: str = "label"
    max_image_bytes: int = 50_000_000

    @property
    def layout(self) -> Columns:
        return FORMATS[self.format]

    def check(self) -> None:
        """Refuse columns that the format does not have.

        Raises:
            PreferenceError: naming them.
        """
        if unknown := [name for name in self.columns if name not in self.layout.names]:
            raise PreferenceError(
                f"`preferences.columns` must map some of {', '.join(self.layout.names)} to names in the files,"
                f" got {', '.join(unknown)}"
            )
        if self.difficulty != "label" and not self.difficulty_columns:
            raise PreferenceError(
                f"`preferences.difficulty` must be another than {self.difficulty}: `preferences.format` {self.format}"
                f" has no column of {self.difficulty}s"
            )

    @property
    def difficulty_columns(self) -> tuple[str, ...]:
        return {"label": (), "score": self.layout.scores, "rank": self.layout.ranks}[self.difficulty]

    def spellings(self, column: str) -> tuple[str, ...]:
        """Names that a column of the format may have in the files."""
        return (self.columns[column],) if column in self.columns else self.layout.spellings(column)

    def spelled(self, column: str, present: Collection[str]) -> str:
        """Name of a column in a file or row with the columns ``present``."""
        spellings = self.spellings(column)
        return next((name for name in spellings if name in present), spellings[0])

    @property
    def image_names(self) -> set[str]:
        """Names that columns of images may have in the files."""
        return {name for column in self.layout.images for name in self.spellings(column)}

    def wanted(self, present: Collection[str], *, images: bool = True) -> list[str]:
        """Names of the columns to read from a file.

        Args:
            present: columns of the file; a required column that is not among them has its usual name.
            images: whether to read the images.
        """
        layout = self.layout
        labels, _ = self.preference_columns(present)
        columns = [*filter(None, [layout.group]), layout.prompt, *filter(None, [layout.winner]), *labels]
        columns += [*self.difficulty_columns, *(layout.images if images else ())]
        if layout.has_label and self.spelled(layout.has_label, present) in present:
            columns.append(layout.has_label)
        return list(dict.fromkeys(self.spelled(column, present) for column in columns))

    def refuse_missing(self, path: Path, present: Collection[str]) -> None:
        """Refuse a file that lacks a required column.

        Raises:
            PreferenceError: naming the missing columns, those of the file, and what to set.
        """
        if absent := [name for name in self.wanted(present) if name not in present]:
            raise missing_columns(path, absent, present)

    def preference_columns(self, present: Collection[str]) -> tuple[tuple[str, ...], float]:
        """Columns that say which image is preferred, and the sign that makes higher values better."""
        layout = self.layout
        if layout.labels is None:
            return (), 1.0

        def has(columns: tuple[str, ...]) -> bool:
            return bool(columns) and all(self.spelled(column, present) in present for column in columns)

        by_rank = not layout.labels or (has(layout.ranks) and not has(layout.labels))
        return (layout.ranks, -1.0) if by_rank else (layout.labels, 1.0)


@dataclass(frozen=True)
class Row:
    """A judged group of images.

    Attributes:
        file, number: path of the file and number of the line or row, from 1; 1 for a ranked folder.
        prompt: prompt of the images.
        images: bytes or path of each image.
        labels: label of each image, higher is preferred; equal in a tie.
        scores: score of each image that ranks them, higher is better; see `PreferenceSource.difficulty`.
    """

    file: str
    number: int
    prompt: str
    images: tuple[bytes | str, ...]
    labels: tuple[float, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Fault:
    """Reason why a row, or an image of it, is unusable."""

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.file}:{self.number}: {self.reason}", MAX_FAULT_SHOWN)


def row_of(
    file: str, number: int, values: Any, source: PreferenceSource, *, images: bool = True, folder: Path | None = None
) -> Row | Fault | None:
    """Parse a row; a fault if invalid, `None` if unlabelled. Ties, and rows without ``images``, have no images.

    Args:
        file, number: see `Row`.
        values: see `Numbered`.
        images: whether the values hold the images.
        folder: base of relative paths of images; `None`: the file must hold the images.
    """
    try:
        if isinstance(values, ValueError):
            raise values
        layout = source.layout

        def items(columns: tuple[str, ...]) -> dict[str, Any]:
            return _per_image(values, [source.spelled(column, values) for column in columns])

        def numbers(columns: tuple[str, ...]) -> tuple[float, ...]:
            found = items(columns)
            return tuple(number_of(found, name) for name in found)

        if layout.has_label and is_false(values.get(source.spelled(layout.has_label, values))):
            return None
        prompt = prompt_of(values, source.spelled(layout.prompt, values))
        if layout.winner:
            names = [source.spellings(column)[0] for column in layout.images]
            winner = winner_of(values, source.spelled(layout.winner, values), names)
            if winner is None:
                return None
            labels = tuple(float(name == winner) for name in names)
        elif layout.labels is None:
            labels = (1.0, *(0.0 for _ in layout.images[1:]))
        else:
            columns, sign = source.preference_columns(values)
            labels = tuple(sign * number for number in numbers(columns))
        scores = labels
        if source.difficulty != "label":
            sign = -1.0 if source.difficulty == "rank" else 1.0
            scores = tuple(sign * number for number in numbers(source.difficulty_columns))
        if len(labels) < 2:
            raise ValueError(f"must have at least 2 images, got {len(labels)}")
        found = items(layout.images) if images and len(set(labels)) > 1 else {}
        if len(scores) != len(labels) or (found and len(found) != len(labels)):
            raise ValueError(
                f"must have as many labels and scores as images, got {len(labels)} labels, {len(scores)} scores"
                + (f" and {len(found)} images" if found else "")
            )
        return Row(file, number, prompt, tuple(image_of(found, name, folder) for name in found), labels, scores)
    except ValueError as error:
        return Fault(file, number, str(error))


def _per_image(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Values of the images, by name of the column, or of the item in a column of lists."""
    if len(names) > 1:
        return {name: values.get(name) for name in names}
    return {f"{names[0]}[{index}]": item for index, item in enumerate(list_of(values, names[0]))}


def grouped(rows: Iterable[Numbered], source: PreferenceSource, *, in_any_order: bool) -> Iterator[Numbered]:
    """Join rows of one image each into rows with lists, numbered as the first row of each.

    A row that cannot be read stays alone, so that each counts as one.

    Args:
        in_any_order: hold all rows to join those that are apart; otherwise a group that appears again is unreadable.
    """
    column = source.layout.group
    assert column is not None, "called for a format with groups only"

    def key(row: Numbered) -> Any:
        number, values = row
        return number if isinstance(values, ValueError) else (values.get(source.spelled(column, values)),)

    if in_any_order:
        held: dict[str, list[Numbered]] = {}
        for row in rows:
            held.setdefault(repr(key(row)), []).append(row)
        yield from (_joined(group, source) for group in held.values())
        return
    seen = set[str]()
    for value, group in groupby(rows, key):
        name, members = repr(value), list(group)
        if name in seen:
            reason = f"`{column}` {shown(value[0])} has other rows before; sort the file by it, or split it"
            yield members[0][0], ValueError(reason)
        else:
            seen.add(name)
            yield _joined(members, source)


def _joined(rows: Sequence[Numbered], source: PreferenceSource) -> Numbered:
    (number, first), layout = rows[0], source.layout
    values = [values for _, values in rows]
    if isinstance(first, ValueError):
        return number, first
    key, prompt = (source.spelled(column, first) for column in (str(layout.group), layout.prompt))
    if first.get(key) is None:
        return number, ValueError(f"`{key}` must not be null")
    if any(each.get(prompt) != first.get(prompt) for each in values):
        return number, ValueError(f"`{prompt}` must be the same in all rows of `{key}` {shown(first.get(key))}")
    columns = (*layout.images, *(layout.labels or ()), *layout.ranks, *layout.scores)
    names = {source.spelled(column, first) for column in columns} & {*first}
    return number, first | {name: [each.get(name) for each in values] for name in names}

"""Faults of a prompt file, collected into one error."""

import re
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cdpo_ray.errors import PromptError

NUM_SHOWN = 10
_UNDECODED = re.compile("[\udc80-\udcff]")  # invalid bytes as decoded with `errors="surrogateescape"`


class FileFaults:
    """Faults of one file: the first `NUM_SHOWN` are stored, all are counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_faults = 0
        self.shown: list[str] = []

    def add(self, place: str, fault: PromptError) -> None:
        """Record a fault; ``place``: its line or row, such as ``12`` or ``row 12``."""
        self.num_faults += 1
        if len(self.shown) < NUM_SHOWN:
            self.shown.append(f"  {self.path}:{place}: {fault}")

    def refuse(self) -> None:
        """Raise PromptError if there are any faults."""
        if not self.num_faults:
            return
        summary = "1 fault" if self.num_faults == 1 else f"{self.num_faults:,} faults"
        if self.num_faults > len(self.shown):
            summary += f", the first {len(self.shown)}"
        raise PromptError("\n".join([f"{self.path}: {summary}", *self.shown]))


def missing_column(column: str, columns: Iterable[str], key: str = "column") -> PromptError:
    """Error about a column that a file does not have; ``key``: configuration key that names it."""
    names = list(columns)
    shown = ", ".join(f"`{reprlib.repr(name)[1:-1]}`" for name in names[:NUM_SHOWN])
    shown += ", ..." * (len(names) > NUM_SHOWN)
    return PromptError(f"has no column `{column}`, got {shown or 'no columns'}; set `{key}` to one of them")


def column_of(column: str, columns: Sequence[str], key: str = "column") -> str:
    """Name of a column as the file spells it: an exact match, or the only one that differs in case and spaces only.

    Args:
        key: configuration key that names the column.

    Raises:
        PromptError: no column matches, or several do.
    """
    matches = [name for name in columns if name == column] or [
        name for name in columns if name.strip().casefold() == column.strip().casefold()
    ]
    if not matches:
        raise missing_column(column, columns, key)
    if len(matches) > 1:
        raise PromptError(f"has column `{column}` twice; remove one, or set `{key}` to another")
    return matches[0]


def not_text(column: str, value: object) -> PromptError:
    """Error about a value that is not text."""
    got = "null" if value is None else reprlib.repr(value)
    return PromptError(f"`{column}` must be text, got {got}")


def undecoded(text: str) -> PromptError | None:
    """Error about a text, decoded with ``surrogateescape``, that holds a byte that is not UTF-8; ``None``: no fault."""
    found = _UNDECODED.search(text)
    if found is None:
        return None
    return PromptError(f"is not UTF-8 (byte {ord(found[0]) - 0xDC00:#04x}); save the file as UTF-8")

"""What is wrong with a prompt file -> all of it in one error."""

import re
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from cdpo_ray.errors import PromptError

NUM_SHOWN = 10
_UNDECODED = re.compile("[\udc80-\udcff]")  # bytes that `errors="surrogateescape"` let through


class FileFaults:
    """Faults of one file: the first few are kept, all are counted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_faults = 0
        self.shown: list[str] = []

    def add(self, place: str, fault: PromptError) -> None:
        """Take down a fault at a place: ``12`` (a line) or ``row 12``."""
        self.num_faults += 1
        if len(self.shown) < NUM_SHOWN:
            self.shown.append(f"  {self.path}:{place}: {fault}")

    def refuse(self) -> None:
        """Raise PromptError if there was any."""
        if not self.num_faults:
            return
        told = "1 fault" if self.num_faults == 1 else f"{self.num_faults:,} faults"
        if self.num_faults > len(self.shown):
            told += f", the first {len(self.shown)}"
        raise PromptError("\n".join([f"{self.path}: {told}", *self.shown]))


def missing_column(column: str, there: Iterable[str]) -> PromptError:
    names = list(there)
    shown = ", ".join(f"`{reprlib.repr(name)[1:-1]}`" for name in names[:NUM_SHOWN])
    shown += ", ..." * (len(names) > NUM_SHOWN)
    return PromptError(f"has no `{column}`, but {shown or 'nothing'}; name one by `column`")


def column_of(column: str, there: Sequence[str]) -> str:
    """The name of a column in a file: as it is asked for, or the only one that differs in case and spaces alone.

    Raises:
        PromptError: there is none, or several.
    """
    named = [name for name in there if name == column] or [
        name for name in there if name.strip().casefold() == column.strip().casefold()
    ]
    if not named:
        raise missing_column(column, there)
    if len(named) > 1:
        raise PromptError(f"has `{column}` twice; leave one out, or name another by `column`")
    return named[0]


def not_text(column: str, value: object) -> PromptError:
    got = "null" if value is None else reprlib.repr(value)
    return PromptError(f"`{column}` must be text, got {got}")


def undecoded(text: str) -> PromptError | None:
    """The fault of a text that was decoded with ``surrogateescape`` and holds a byte that is not UTF-8."""
    found = _UNDECODED.search(text)
    if found is None:
        return None
    return PromptError(f"is not UTF-8 (byte {ord(found[0]) - 0xDC00:#04x}); save the file as UTF-8")

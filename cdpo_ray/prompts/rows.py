"""Rows of a prompt file: which columns are read, and what a value means."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cdpo_ray.errors import PromptError
from cdpo_ray.prompts.faults import column_of, not_text


class Row(NamedTuple):
    """A prompt, unchanged, and its category; empty: it has none."""

    prompt: str
    category: str = ""


@dataclass(frozen=True)
class Columns:
    """Columns to read.

    Attributes:
        prompt: name of the column that holds the prompts.
        category: name of the column that holds their categories, which the file must have; ``None``: `category`, if the
            file has it and its values are text or whole numbers.
    """

    prompt: str
    category: str | None = None

    def within(self, names: Sequence[str]) -> tuple[str, str | None]:
        """Both columns as a file spells them; the second is ``None`` if the file has no categories.

        Raises:
            PromptError: the file does not have exactly one column of a name.
        """
        prompt = column_of(self.prompt, names)
        if self.category is not None:
            return prompt, column_of(self.category, names, key="category_column")
        try:
            found = column_of("category", names)
        except PromptError:
            return prompt, None
        return prompt, found if found != prompt else None

    def row(self, prompt: str, category: Any = None, name: str | None = None) -> Row | PromptError:
        """A row, or its fault.

        Args:
            category: value of the category's column; a whole number becomes text with the column's name before it.
            name: name of the category's column; ``None``: there is none.
        """
        if name is None or category is None:
            return Row(prompt)
        if isinstance(category, str):
            return Row(prompt, category.strip())
        if isinstance(category, int) and not isinstance(category, bool):
            return Row(prompt, f"{name} {category}")
        return Row(prompt) if self.category is None else not_text(name, category)

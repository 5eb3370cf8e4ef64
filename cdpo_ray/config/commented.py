"""Values of a configuration -> YAML in which each key has a comment."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cdpo_ray.config.reference import all_keys

WIDTH = 100
MAX_FLOW_KEYS = 3
"""Largest section that is written in one line, with one comment."""


def commented_yaml(values: Mapping[str, Any], head: str) -> str:
    """YAML of plain values, with the first sentence of its description above each key.

    Args:
        values: sections of a configuration; keys that are left out have their defaults.
        head: comment at the top.
    """
    lines = [*_comment(head, ""), ""]
    for name, section in values.items():
        lines += [*_lines(name, name, section, ""), ""]
    return "\n".join(lines)


def _lines(full_name: str, name: str, value: Any, indent: str) -> Iterator[str]:
    key = all_keys().get(full_name)
    if key:
        yield from _comment(key.summary, indent)
    if key and key.is_section and isinstance(value, Mapping) and (not indent or len(value) > MAX_FLOW_KEYS):
        yield f"{indent}{name}:"
        for inner, each in value.items():
            yield from _lines(f"{full_name}.{inner}", inner, each, f"{indent}  ")
    else:
        yield f"{indent}{name}: {_flow(value)}"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return re.sub(r"\n(\.\.\.\n)?$", "", text)

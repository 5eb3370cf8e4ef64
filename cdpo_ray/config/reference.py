"""Sections -> reference of their keys: text for a terminal, and `docs/config.md`."""

import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cdpo_ray.config.reading import unknown_key
from cdpo_ray.config.section import nearest
from cdpo_ray.config.whole import Config
from cdpo_ray.errors import ConfigError, printable

WIDTH = 100
PAGE_WIDTH = 120
DEFAULT_SHOWN = 24
"""Maximum number of characters of a default in a list of keys."""
SECTION_DEFAULT = "its keys' defaults"
LIMITS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "multipleOf": "multiple of {}",
    "minLength": "not empty",
    "maxLength": "at most {} characters",
    "pattern": "matches `{}`",
    "minItems": "not empty",
    "minProperties": "not empty",
}
"""Keyword of JSON schema -> words; every least length is 1, but for arrays of fixed length."""
PAGE_HEAD = """\
# Configuration

<!-- Written by `python -m cdpo_ray.config.reference > docs/config.md`; edit the docstrings in `cdpo_ray/config/`. -->

This page describes every key of a configuration file. `section.key=value` on the command line overrides a key;
`cdpo check CONFIG` reports all errors of a configuration at once. Relative paths start at the working directory, and
`~` is the home directory.
"""


@dataclass(frozen=True)
class Key:
    """A key of the configuration, or a section.

    Attributes:
        name: as on the command line: `training.beta`.
        type: type of its values, in the words of JSON schema; a section is an `object`.
        limits: bounds of its values.
        choices: allowed values; empty: not a closed list.
        default: as in YAML; `None`: the key is required.
        description: whole sentences.
        is_section: it has keys of its own.
        same_as: an earlier section with the same keys.
    """

    name: str
    type: str
    limits: tuple[str, ...]
    choices: tuple[str, ...]
    default: str | None
    description: str
    is_section: bool = False
    same_as: str | None = None

    @property
    def summary(self) -> str:
        """First sentence of the description."""
        return re.split(r"(?<=\.)\s", self.description, maxsplit=1)[0]

    @property
    def text(self) -> str:
        """The description, and where the keys of a section are described that are those of an earlier one."""
        return f"{self.description} Same keys as `{self.same_as}`." if self.same_as else self.description


def describe(name: str | None = None) -> str:
    """All keys, one line each; or one section or key with whole descriptions.

    Raises:
        ConfigError: there is no such section or key.
    """
    keys = all_keys()
    if name is None:
        return "\n\n".join("\n".join(_overview(group)) for group in _groups())
    if name not in keys:
        sections = ", ".join(key for key in keys if "." not in key)
        suggestion = _suggestion(name)
        hint = "" if suggestion else f"; the sections are {sections}"
        raise ConfigError(f"{unknown_key(printable(name), suggestion)}{hint}")
    head, *inside = _group(keys[name])
    return "\n\n".join("\n".join(_details(key)) for key in (replace(head, same_as=None), *inside))


def reference_page() -> str:
    """Markdown of all keys."""
    lines = [PAGE_HEAD]
    for head, *inside in _groups():
        lines += [f"## `{head.name}`", ""]
        if not head.is_section:
            inside = [head]
        else:
            lines += [*_wrapped(head.description, PAGE_WIDTH), ""]
        for key in inside:
            default = "required" if key.default is None else f"default {_code(key.default)}"
            facts = ["section" if key.is_section else key.type.replace("|", "or"), *key.limits]
            facts += [f"one of {', '.join(map(_code, key.choices))}"] if key.choices else []
            lines += [f"- **`{key.name}`**: {'; '.join([*facts, default])}", ""]
            lines += [*_wrapped(key.text, PAGE_WIDTH, indent=" " * 4), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


@cache
def all_keys() -> Mapping[str, Key]:
    """Every section and key by its name, in the order of declaration; values of `search.space` are under ``<key>``."""
    schema = Config.model_json_schema()
    return {key.name: key for key in _keys(schema, schema["$defs"], "", {})}


def _keys(
    section: Mapping[str, Any], definitions: Mapping[str, Any], parent: str, first: dict[str, str]
) -> Iterator[Key]:
    """Keys of a section and of those within it.

    Args:
        section, definitions: JSON schema.
        parent: name of the section with its dot.
        first: definition -> first section that has it; extended.
    """
    for name, field in section["properties"].items():
        full_name = f"{parent}{name}"
        alternatives = field.get("anyOf", [field])
        references = [_reference(each) for each in (*alternatives, field.get("additionalProperties"))]
        reference = next(filter(None, references), None)
        inner = definitions[reference] if reference else _variants(field, definitions)
        is_section = inner is not None and field.get("type") != "object"
        known = first.setdefault(reference, full_name) if reference else full_name
        yield Key(
            name=full_name,
            type=" | ".join(_type(each) for each in alternatives),
            limits=tuple(dict.fromkeys(limit for each in alternatives for limit in _limits(each))),
            choices=_choices(*alternatives),
            default=_default(field, is_required=name in section.get("required", ())),
            description=" ".join((field.get("description") or (inner or {}).get("description", "")).split()),
            is_section=is_section,
            same_as=known if known != full_name else None,
        )
        if inner:
            yield from _keys(inner, definitions, f"{full_name}." if is_section else f"{full_name}.<key>.", first)


def _variants(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keys that any variant of a field has; `None`: it has no variants."""
    variants = [definitions[_reference(each) or ""] for each in field.get("oneOf", ())]
    if not variants:
        return None
    properties = {name: schema for variant in variants for name, schema in variant["properties"].items()}
    names = [variant["properties"]["name"]["const"] for variant in variants if "const" in variant["properties"]["name"]]
    return {"properties": properties | {"name": properties["name"] | {"enum": names, "default": field["default"]}}}


def _reference(schema: Any) -> str | None:
    return schema["$ref"].rpartition("/")[2] if isinstance(schema, dict) and "$ref" in schema else None


def _type(schema: Mapping[str, Any]) -> str:
    if schema.get("type") == "array":
        items = schema.get("items") or schema.get("prefixItems", [{}])[0]
        return f"array of {_type(items)}"
    if "const" in schema:
        return "string"
    return str(schema.get("type", "object" if "$ref" in schema else "any"))


def _limits(schema: Mapping[str, Any]) -> list[str]:
    own = [words.format(_number(schema[keyword])) for keyword, words in LIMITS.items() if keyword in schema]
    if schema.get("type") != "array":
        return own
    if "prefixItems" in schema:
        own = [f"{len(schema['prefixItems'])} items"]
    items = schema.get("items") or schema.get("prefixItems", [{}])[0]
    return own + [f"each {limit}" for limit in _limits(items)]


def _number(value: Any) -> Any:
    is_large_power = isinstance(value, int) and value > 2**32 and value.bit_count() == 1
    return f"2^{value.bit_length() - 1}" if is_large_power else value


def _choices(*alternatives: Mapping[str, Any]) -> tuple[str, ...]:
    """Allowed values, those of items for an array; ``true`` and ``false`` beside others."""
    found: list[str] = []
    for schema in alternatives:
        each = schema.get("items", {}) if schema.get("type") == "array" else schema
        found += map(str, [each["const"]] if "const" in each else each.get("enum", []))
    has_boolean = any(schema.get("type") == "boolean" for schema in alternatives)
    return ("true", "false", *found) if found and has_boolean else tuple(found)


def _default(field: Mapping[str, Any], *, is_required: bool) -> str | None:
    """As in YAML; a section with a default consists of its keys' defaults."""
    if is_required:
        return None
    if "default" not in field:
        return "{}"
    value = field["default"]
    if isinstance(value, dict):
        return SECTION_DEFAULT
    return value if isinstance(value, str) else json.dumps(value)


def _groups() -> list[list[Key]]:
    """Top-level keys, each with all keys of its section."""
    return [_group(key) for key in all_keys().values() if "." not in key.name]


def _group(head: Key) -> list[Key]:
    """A key, and all keys within it; without those that an earlier section within it has too."""
    inside = [key for key in all_keys().values() if key.name.startswith(f"{head.name}.")]
    same = [key for key in inside if key.same_as and key.same_as.startswith(f"{head.name}.")]
    return [head, *(key for key in inside if not key.name.startswith(tuple(f"{each.name}." for each in same)))]


def _overview(group: list[Key]) -> list[str]:
    head, *inside = group
    keys = [key for key in inside if not key.is_section or key.same_as] if head.is_section else [head]
    values = [_value(key) for key in keys]
    width, value_width = max(len(key.name) for key in keys), max(map(len, values))
    lines = [
        f"  {key.name:{width}}  {value:{value_width}}  {f'same keys as {key.same_as}' if key.same_as else key.summary}"
        for key, value in zip(keys, values, strict=True)
    ]
    return [f"{head.name}: {head.summary}", *lines] if head.is_section else [f"{head.name}:", *lines]


def _value(key: Key) -> str:
    """Type and default, short."""
    kind = "section" if key.is_section else key.type
    return f"{kind}, required" if key.default is None else f"{kind} = {_shortened(key.default)}"


def _details(key: Key) -> list[str]:
    facts = {
        "type": "section" if key.is_section else key.type,
        "bounds": ", ".join(key.limits),
        "choices": ", ".join(key.choices),
        "default": "required" if key.default is None else key.default,
    }
    if key.is_section:
        facts = {}  # those of its keys follow
    lines = [f"  {name:8} {value}" for name, value in facts.items() if value]
    return [key.name, *lines, *_wrapped(key.text, WIDTH, indent="  ")]


def _wrapped(text: str, width: int, *, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width=width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shortened(text: str) -> str:
    return text if len(text) <= DEFAULT_SHOWN else f"{text[: DEFAULT_SHOWN - 3]}..."


def _code(default: str) -> str:
    return default if default == SECTION_DEFAULT else f"`{default}`"


def _suggestion(name: str) -> str | None:
    """The key that may be meant: one with this last part, or a similar name."""
    names = [*all_keys()]
    last = {full_name.rpartition(".")[2]: full_name for full_name in reversed(names)}
    return last.get(name) or nearest(name, names) or last.get(nearest(name, last) or "")


if __name__ == "__main__":
    sys.stdout.write(reference_page())

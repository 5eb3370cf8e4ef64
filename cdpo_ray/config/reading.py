"""YAML -> Config: all faults at once, in words."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cdpo_ray.config.section import without_credentials
from cdpo_ray.config.whole import Config
from cdpo_ray.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is a fault and 1e-5 is a float."""


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for (key_node, _), key in zip(node.value, keys, strict=True):
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given twice", key_node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Safe YAML; raises ConfigError with file, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `section.key=value` overrides.

    Raises:
        ConfigError: the file cannot be read, or with all faults of the configuration at once.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; give the path of a YAML file") from None
    values = parse_yaml(text, where=str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(values, where=str(path))


def validate(values: Mapping[str, Any], *, where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        inside = {fault["loc"][:-1] for fault in found}  # a faulty item also makes its list too short: told once
        faults = [
            line
            for fault in found
            if fault["type"] != "too_short" or fault["loc"] not in inside
            for line in _speak(fault)
        ]
        counted = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError("\n".join([f"{where}: {counted}", *(f"  {line}" for line in faults)])) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    where = f"override {without_credentials(repr(override))}"
    if not separator or not key:
        raise ConfigError(f"{where}: must be `section.key=value`, for example `training.beta=2000`")
    value = parse_yaml(text, where=where)
    if key == "rewards" and isinstance(value, list):  # the short form people type: rewards=[clip,jpeg_size]
        key = "rewards.names"
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: `{parent}` is a value, not a section")
        place = child
    place[last] = value


def _speak(fault: Any) -> Iterable[str]:
    """One pydantic fault as a sentence with the key as the user wrote it."""
    where = ".".join(str(part) for part in fault["loc"])
    kind, got = fault["type"], fault["input"]
    shown = without_credentials(repr(got))
    context = {name: int(x) if x == 0.0 or x == 1.0 else x for name, x in fault.get("ctx", {}).items()}  # 0, not 0.0
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _keys_beside(fault["loc"]), n=1)
        parent = ".".join(str(part) for part in fault["loc"][:-1])
        suggestion = f"{parent}.{near[0]}".lstrip(".") if near else ""
        yield f"unknown key `{where}`" + (f"; did you mean `{suggestion}`?" if near else "")
    elif kind == "missing":
        yield f"`{where}` is missing"
    elif kind == "value_error":
        for message in str(context.get("error", fault["msg"])).split("\n"):
            if isinstance(got, dict):
                yield f"{where}: {message}" if where else message
            elif fault["loc"][-1:] == ("[key]",):  # of a section whose keys are the user's own
                yield f"{'.'.join(map(str, fault['loc'][:-2]))}: {message}"
            else:
                what, separator, hint = message.partition("; ")
                yield f"`{where}` {what}, got {shown}{separator}{hint}"
    elif kind == "too_short":
        yield f"`{where}` must not be empty"
    else:
        limit = {
            "greater_than": "be > {gt}",
            "greater_than_equal": "be >= {ge}",
            "less_than": "be < {lt}",
            "less_than_equal": "be <= {le}",
            "multiple_of": "be a multiple of {multiple_of}",
            "literal_error": "be {expected}",
            "string_pattern_mismatch": "match {pattern}",
        }.get(kind)
        wish = limit.format(**context) if limit else fault["msg"].removeprefix("Input should ")
        yield f"`{where}` must {wish}, got {shown}"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    kind: Any = Config
    for part in location[:-1]:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif _is_section(kind):
            kind = kind.model_fields[str(part)].annotation
        kind = next((each for each in get_args(kind) if _is_section(each)), kind) if _may_be_none(kind) else kind
    return list(kind.model_fields) if _is_section(kind) else []


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _may_be_none(kind: Any) -> bool:
    return NoneType in get_args(kind)

"""YAML -> Config, with all faults reported at once."""

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from cdpo_ray.config.section import fields_of, named, nearest, sections_in, without_credentials
from cdpo_ray.config.shipped import shipped_configs
from cdpo_ray.config.whole import Config
from cdpo_ray.errors import ConfigError

MAX_CHARACTERS = 100_000
MAX_VALUES = 10_000
"""Maximum number of values in a config file; an alias counts as its whole target, a text as 1 per 100 characters."""
MAX_DEPTH = 30
MAX_DIGITS = 50
MAX_FAULTS_SHOWN = 20
MAX_VALUE_SHOWN = 200
MAX_LINE_SHOWN = 1000
MOVED = {f"training.{key}": f"training.loss.{key}" for key in ("label_smoothing", "sft_weight")}
"""Key of versions up to 0.2 -> where it is now."""
YAML_TAG = "tag:yaml.org,2002:"
PLAIN_TYPES = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """Safe YAML of plain values: a repeated key is a fault, 1e-5 is a float, and a date is text.

    Short texts that would take long to read are refused: nested aliases, deep nesting, numbers with many digits.
    """

    yaml_constructors = {  # noqa: RUF012 - PyYAML looks them up on the class
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(YAML_TAG) in PLAIN_TYPES
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{YAML_TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.num_values = 0
        self.sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self.num_values
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _fault(f"values are nested deeper than {MAX_DEPTH} levels", event.start_mark)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if node not in self.sizes:
                raise _fault("an alias refers to a value that contains it", event.start_mark)
            self.num_values += self.sizes[node]
        else:
            self.num_values += 1 + (len(node.value) // 100 if isinstance(node, yaml.ScalarNode) else 0)
            self.sizes[node] = self.num_values - before
        if self.num_values > MAX_VALUES:
            raise _fault(f"more than {MAX_VALUES:,} values, targets of aliases included", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = set()
        for key, _ in node.value:
            kind = key.tag.removeprefix(YAML_TAG)
            if not isinstance(key, yaml.ScalarNode) or kind not in ("str", "merge"):
                raise _fault(f"a key must be text, got {kind} {_shown(key.value)}; quote it", key.start_mark)
            if key.value in names:
                raise _fault(f"key `{_key(key.value)}` is given twice", key.start_mark)
            names.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(YAML_TAG)
        if kind in ("int", "float") and len(node.value) > MAX_DIGITS:
            raise _fault(
                f"a number of {len(node.value):,} characters; at most {MAX_DIGITS} are allowed", node.start_mark
            )
        try:
            value = super().construct_object(node, deep=True)
        except (ValueError, LookupError):
            raise _fault(f"{_shown(node.value)} is not a valid {kind}", node.start_mark) from None
        del self.constructed_objects[node]  # each alias gets its own copy, so that an override changes only one
        return value


def _fault(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


_Loader.add_implicit_resolver(
    f"{YAML_TAG}float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Safe YAML; raises ConfigError with file, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.reader.ReaderError as error:
        where = f"{where}:{text.count(chr(10), 0, error.position) + 1}"
        reason = f"holds the character U+{ord(text[error.position]):04X}, which YAML does not allow"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        reason = str(getattr(error, "problem", None) or error)
    except (ValueError, OverflowError) as error:  # PyYAML's scanner, for an escape such as "\UFFFFFFFF"
        reason = str(error)
    raise ConfigError(f"{where}: not valid YAML: {_shortened(reason)}")


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    where: str = "configuration",
) -> Config:
    """Read and validate a configuration.

    Args:
        source: path of a YAML file, name of a config of the package, or nested dictionaries of plain values.
        overrides: values by dotted key, ``{"training.beta": 2000}``, or as on the command line,
            ``["training.beta=2000"]``.
        where: origin of dictionaries, for messages.

    Raises:
        ConfigError: the file cannot be read, or the configuration is invalid; lists all faults.
    """
    if isinstance(source, Mapping):
        values = copy.deepcopy(dict(source))
    else:
        path = Path(os.path.expanduser(source))
        if not path.exists():
            path = shipped_configs().get(str(path), path)
        where, values = str(path), parse_yaml(_read_text(path), where=str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: must be a mapping of sections, got {type(values).__name__}")
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(values, str(key), copy.deepcopy(value), shown=f"override {_shown(key)}")
    else:
        for override in overrides:
            _apply(values, override)
    return validate(values, where=where)


def _read_text(path: Path) -> str:
    hint = "give the path of a YAML file"
    if near := nearest(str(path), shipped_configs()):
        hint += f", or a config of the package (`cdpo configs`), such as {near}"
    try:
        if path.exists() and not path.is_file():  # reading a pipe might never end
            raise ConfigError(f"{path}: is {'a folder' if path.is_dir() else 'not a regular file'}; {hint}")
        with path.open("rb") as handle:
            text = handle.read(MAX_CHARACTERS + 1).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}: {path.absolute()}; {hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; save it as UTF-8") from None
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{path}: has more than {MAX_CHARACTERS:,} characters; {hint}")
    return text


def unknown_key(key: str, suggestion: str | None) -> str:
    """Sentence about a key that does not exist, with the one that may be meant."""
    return f"unknown key `{key}`" + (f"; did you mean `{suggestion}`?" if suggestion else "")


def validate(values: Mapping[str, Any], *, where: str) -> Config:
    """Plain values -> configuration.

    Args:
        where: source of the values, for messages.

    Raises:
        ConfigError: the configuration is invalid; lists all faults.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        inside = {fault["loc"][:-1] for fault in found}  # a faulty item also makes its list too short: report it once
        faults = [fault for fault in found if fault["type"] != "too_short" or fault["loc"] not in inside]
        lines = [line for fault in faults[:MAX_FAULTS_SHOWN] for line in _sentences(fault)]
        num_hidden = len(faults[MAX_FAULTS_SHOWN:])
        num_faults = len(lines) + num_hidden
        counted = "1 fault" if num_faults == 1 else f"{num_faults:,} faults"
        more = [f"  and {num_hidden:,} more"] if num_hidden else []
        lines = [f"  {_shortened(without_credentials(line), MAX_LINE_SHOWN)}" for line in lines]
        raise ConfigError("\n".join([f"{where}: {counted}", *lines, *more])) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    shown = f"override {_shown(override)}"
    if not separator or not key:
        raise ConfigError(f"{shown}: must be `section.key=value`, for example `training.beta=2000`")
    _set(values, key, parse_yaml(text, where=shown), shown=shown)


def _set(values: dict[str, Any], key: str, value: Any, *, shown: str) -> None:
    """Set one value, creating its sections.

    Args:
        key: dotted.
        shown: the override, for messages.
    """
    if ":" in key and key.partition(":")[0] in Config.model_fields:
        raise ConfigError(f"{shown}: sections and keys are separated by dots, as in `{_key(key.replace(':', '.'))}`")
    if key == "rewards" and isinstance(value, list):  # the short form: rewards=[clip,jpeg_size]
        key = "rewards.names"
    *parents, last = key.split(".")
    if len(parents) > MAX_DEPTH:
        raise ConfigError(f"{shown}: has {len(parents):,} nested sections; no key is that deep")
    place = values
    kind: Any = Config
    for parent in parents:
        field = fields_of(kind).get(parent)
        kind = field.annotation if field else None
        child = place.setdefault(parent, {})
        if len(sections_in(kind)) > 1:  # a variant may be given by its name alone
            child = place[parent] = named(child)
        if not isinstance(child, dict):
            raise ConfigError(f"{shown}: `{_key(parent)}` is a value, not a section")
        place = child
    place[last] = value


def _shown(value: Any) -> str:
    """A value in one line: control characters escaped, credentials removed, shortened."""
    return _shortened(without_credentials(repr(value)))


def _key(name: Any) -> str:
    return _shortened(repr(str(name))[1:-1])


def _shortened(text: str, limit: int = MAX_VALUE_SHOWN) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 4 :]}"


def _sentences(fault: Any) -> Iterable[str]:
    """One pydantic fault in sentences, with the key as the user wrote it."""
    location, beside, owners = _located(fault["loc"])
    where = ".".join(map(_key, location))
    kind, got = fault["type"], fault["input"]
    context = {name: int(x) if x == 0.0 or x == 1.0 else x for name, x in fault.get("ctx", {}).items()}  # 0, not 0.0
    if kind == "extra_forbidden":
        near = nearest(str(location[-1])[:MAX_VALUE_SHOWN], beside)
        parent = ".".join(map(_key, location[:-1]))
        suggestion = MOVED.get(where) or (near and f"{parent}.{near}".lstrip("."))
        if owners:
            yield f"`{where}` belongs to `{parent}` {' or '.join(map(repr, owners))}, got {_shown(got)}"
        else:
            yield unknown_key(where, suggestion)
    elif kind == "missing":
        yield f"`{where}` is missing"
    elif kind == "value_error":
        for message in str(context.get("error", fault["msg"])).split("\n"):
            if isinstance(got, dict):
                yield f"{where}: {message}" if where else message
            elif location[-1:] == ("[key]",):  # of a section whose keys the user chooses
                yield f"{'.'.join(map(_key, location[:-2]))}: {message}"
            else:
                what, separator, hint = message.partition("; ")
                yield f"`{where}` {what}, got {_shown(got)}{separator}{hint}"
    elif kind in ("too_short", "string_too_short"):
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
            "string_too_long": "have at most {max_length} characters",
        }.get(kind)
        wish = limit.format(**context) if limit else fault["msg"].removeprefix("Input should ")
        yield f"`{where}` must {wish}, got {_shown(got)}"


def _located(location: Sequence[int | str]) -> tuple[tuple[int | str, ...], list[str], list[str]]:
    """The key of a fault as the user wrote it, the keys beside it, and the names of the variants that have such a key.

    Args:
        location: as in pydantic's faults, where a tag follows the key of a variant. A fault of a variant's name is one
            of the variant, which may be given by its name alone.
    """
    kind: Any = Config
    key: list[int | str] = []
    beside: list[str] = []
    owners: list[str] = []
    variants: tuple[Any, ...] = ()
    for part in location:
        if len(sections_in(kind)) > 1:
            variants = sections_in(kind)
            kind = next((each for each in variants if each.model_fields["name"].default == part), variants[-1])
            continue
        fields = fields_of(kind)
        if not (variants and part == "name"):
            key.append(part)
            beside = [*fields]
            owners = [
                each.model_fields["name"].default
                for each in variants
                if part in each.model_fields and not each.model_fields["name"].is_required()
            ]
        variants = ()
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            kind = fields[str(part)].annotation if part in fields else None
    return tuple(key), beside, owners

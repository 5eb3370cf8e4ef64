"""Knobs of a search: which keys it may vary, their values, and the conditions under which they are active."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from cdpo_ray.config.curriculum import CurriculumSection
from cdpo_ray.config.section import fields_of, nearest, sections_in
from cdpo_ray.config.training import TrainingSection

SECTIONS: dict[str, type[BaseModel]] = {"curriculum": CurriculumSection, "training": TrainingSection}
REFUSED = {
    **{
        f"training.{name}": "changes how a schedule is trained, not its outcome"
        for name in TrainingSection.HOW_NOT_WHAT
    },
    "training.seed": "is not part of a schedule: `search.confirm_seeds` trains the best again with other seeds",
    "training.loss.name": "is given as `training.loss`",
    "training.loss.options": "are those of your own function; give other functions as choices of `training.loss`",
    "training.reference": "needs `rounds` > 1, but a search has one round, or `start_from`",
    "training.start_from": "is the start of every trial",
    "curriculum.preset": "sets other keys: give those",
}
"""Keys that a search must not vary, and why."""


@dataclass(frozen=True)
class Knob:
    """A config key that a search varies: one of ``choices``, or a number from ``low`` to ``high``, both inclusive.

    Attributes:
        log: draw uniformly in the logarithm.
        is_integer: the range has integers only.
        when: other knob -> values for which this knob is active; an inactive knob has no value.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    is_integer: bool = False
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def is_active(self, point: Mapping[str, Any]) -> bool:
        """Whether the knob is active, given the values of the knobs that it depends on."""
        return all(key in point and point[key] in values for key, values in self.when.items())

    def holds(self, value: Any) -> bool:
        """Whether this is a value of the knob."""
        if self.low is None or self.high is None:
            return value in self.choices
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high and (not self.is_integer or value == int(value))

    @property
    def largest(self) -> Any:
        """Largest value; all values must be numbers."""
        return max(self.choices) if self.high is None else self.high

    @property
    def sentence(self) -> str:
        """Values and conditions in one line."""
        what = ", ".join(map(str, self.choices))
        if self.low is not None and self.high is not None:
            kind = "integers" if self.is_integer else "numbers"
            what = f"{kind} from {self.low:g} to {self.high:g}" + (", uniform in the logarithm" if self.log else "")
        conditions = [f"{key} is {' or '.join(map(str, values))}" for key, values in self.when.items()]
        return f"{self.key}: {what}" + (f"; when {' and '.join(conditions)}" if conditions else "")


def ordered(knobs: Sequence[Knob]) -> tuple[Knob, ...]:
    """The knobs in their order, but each after those that it depends on; circular dependencies are left out."""
    placed: dict[str, Knob] = {}
    while ready := [knob for knob in knobs if knob.key not in placed and {*knob.when} <= {*placed}]:
        placed[ready[0].key] = ready[0]
    return tuple(placed.values())


def grid_points(knobs: Sequence[Knob]) -> Iterator[dict[str, Any]]:
    """Every point of a space of choices once, the last knob changing fastest.

    Args:
        knobs: each after those that it depends on.
    """

    def points(left: Sequence[Knob], point: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not left:
            yield point
        elif not left[0].is_active(point):
            yield from points(left[1:], point)
        else:
            for choice in left[0].choices:
                yield from points(left[1:], point | {left[0].key: choice})

    return points(knobs, {})


def searched_keys(sections: Mapping[str, Any] = SECTIONS) -> Iterator[str]:
    """Keys that a search may vary, as written on the command line; a variant by its name, and its options."""
    for section, annotation in sections.items():
        for name, info in fields_of(annotation).items():
            key, inner = f"{section}.{name}", sections_in(info.annotation)
            if len(inner) != 1 and key not in REFUSED:
                yield key
            if inner:
                yield from searched_keys({key: info.annotation})


def why_refused(key: str) -> str | None:
    """Why a search must not vary this key; `None`: it may."""
    known = list(searched_keys())
    if key in known:
        return None
    if key in REFUSED:
        return f"`{key}` {REFUSED[key]}"
    if inside := [each for each in known if each.startswith(f"{key}.")]:
        return f"`{key}` is a section; give a key of it, such as `{inside[0]}`"
    near = nearest(key, known)
    return f"unknown key `{key}`; " + (f"did you mean `{near}`?" if near else "give a key of curriculum or training")


def number_type(key: str) -> type[int] | type[float] | None:
    """Type of a key that takes numbers; `None`: it takes none."""
    schema = _adapter(_field(key)).json_schema()
    kinds = {each.get("type") for each in schema.get("anyOf", [schema])} - {"null"}
    return int if kinds == {"integer"} else float if kinds == {"number"} else None


def as_field(key: str, value: Any) -> Any:
    """A value as validated by this key, as a plain value.

    Raises:
        ValidationError: the value is invalid.
    """
    adapter = _adapter(_field(key))
    return adapter.dump_python(adapter.validate_python(value), mode="json")


def must_be_given(key: str) -> bool:
    """Whether the key has no default."""
    return _field(key).is_required()


def default_of(key: str) -> Any:
    """Default of a key."""
    return _field(key).get_default(call_default_factory=True)


def _adapter(info: FieldInfo) -> TypeAdapter[Any]:
    kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _field(key: str) -> FieldInfo:
    section, *parents, last = key.split(".")
    fields = fields_of(SECTIONS[section])
    for parent in parents:
        fields = fields_of(fields[parent].annotation)
    return fields[last]

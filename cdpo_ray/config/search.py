"""A search over schedules: what is tried, how it is judged and how much of it there is."""

import copy
import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cdpo_ray.config.curriculum import CurriculumSection
from cdpo_ray.config.knobs import Knob, as_field, grid_points, must_be_given, number_type, ordered, why_refused
from cdpo_ray.config.section import Section

Objective = Literal["reward", "win_rate", "diversity", "implicit_accuracy"]

PAPER_SCHEDULE: dict[str, Any] = {
    f"curriculum.{name}": info.get_default()
    for name, info in CurriculumSection.model_fields.items()
    if name not in ("num_stages", "updates_per_stage")
}
"""What the paper chose whatever the model; all else depends on the model, so it is as the config says."""

BELONGS_TO: dict[str, tuple[str, Any]] = {
    "curriculum.window": ("curriculum.pacing", "sliding_window"),
    "curriculum.num_margin_draws": ("curriculum.measure", "margin"),
    "training.label_smoothing": ("training.loss", "robust"),
    "training.lora": ("training.method", "lora"),
}
"""Keys that no configuration may give unless another has this value."""


class KnobSection(Section):
    """A list of choices, or a range with both ends included; ``when`` other knobs have these values, else always."""

    choices: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    when: Annotated[dict[str, Any], Field(default_factory=dict)]

    @model_validator(mode="before")
    @classmethod
    def _list_is_choices(cls, given: Any) -> Any:
        if isinstance(given, list | tuple):
            return {"choices": given}
        if not isinstance(given, dict | KnobSection):
            raise ValueError("must be a list of choices, or a range {low: ..., high: ...}")
        return given

    @model_validator(mode="after")
    def _is_a_list_or_a_range(self) -> "KnobSection":
        if (self.choices is None) == (self.low is None and self.high is None):
            raise ValueError("give either `choices` or a range from `low` to `high`")
        if self.choices is not None:
            if self.log:
                raise ValueError("`log` belongs to a range")
            if any(choice in self.choices[:index] for index, choice in enumerate(self.choices)):
                raise ValueError("must not repeat a choice")
        elif self.low is None or self.high is None:
            raise ValueError(f"`{'low' if self.low is None else 'high'}` of the range is missing")
        elif self.low >= self.high:
            raise ValueError(f"`low` must be below `high`, got {self.low:g} and {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError(f"`low` must be > 0 for a range drawn by logarithm, got {self.low:g}")
        return self


def _may_be_searched(key: str) -> str:
    if why := why_refused(key):
        raise ValueError(why)
    return key


def _taken_by_their_fields(space: dict[str, KnobSection]) -> dict[str, KnobSection]:
    faults: list[str] = []
    taken = {}
    for key, knob in space.items():
        if knob.choices is None and number_type(key) is None:
            faults.append(f"`{key}` takes no numbers; give a list of choices")
            continue
        values = []
        for value in knob.choices if knob.choices is not None else (knob.low, knob.high):
            try:
                values.append(as_field(key, value))
            except ValidationError as error:
                wish = error.errors()[0]["msg"].removeprefix("Input should ")
                faults.append(f"`{key}` must {wish}, got {value!r}")
        changed = {"choices": tuple(values)} if knob.choices is not None else {}
        when = {name: [*given] if isinstance(given, list | tuple) else [given] for name, given in knob.when.items()}
        taken[key] = knob.model_copy(update=changed | {"when": when})
    faults += _faults_of_conditions(taken)
    if not faults and (circle := {*taken} - {knob.key for knob in _knobs(taken)}):
        names = ", ".join(f"`{key}`" for key in taken if key in circle)
        faults.append(f"{names} depend on each other in a circle; leave out a `when`")
    if faults:
        raise ValueError("\n".join(faults))
    return taken


def _faults_of_conditions(space: Mapping[str, KnobSection]) -> list[str]:
    faults = []
    for key, section in space.items():
        for name, values in section.when.items():
            if name not in space:
                faults.append(
                    f"`{key}` depends on `{name}`, which is not in the space; add it, or leave out the `when`"
                )
            else:
                other = _knob(name, space[name])
                faults += [
                    f"`{key}` waits for `{name}` to be {value!r}, which it never is; in the space is {other.sentence}"
                    for value in values
                    if not other.holds(value)
                ]
    return faults


def _knob(key: str, section: KnobSection) -> Knob:
    if section.low is None or section.high is None:
        return Knob(key, section.choices or (), when=section.when)
    is_integer = number_type(key) is int
    low, high = (int(section.low), int(section.high)) if is_integer else (section.low, section.high)
    return Knob(key, low=low, high=high, log=section.log, is_integer=is_integer, when=section.when)


def _knobs(space: Mapping[str, KnobSection]) -> tuple[Knob, ...]:
    return ordered([_knob(key, section) for key, section in space.items()])


SearchedKey = Annotated[str, AfterValidator(_may_be_searched)]


class StopEarly(Section):
    """ASHA: after ``grace_stages``, and after each ``reduction_factor`` times as many, one trial in as many goes on."""

    reduction_factor: Annotated[float, Field(gt=1)] = 2
    grace_stages: Annotated[int, Field(ge=1)] = 1

    def stages(self, num_stages: int) -> list[int]:
        """After which trials of at most so many stages may be stopped."""
        rungs = itertools.takewhile(
            lambda stage: stage < num_stages,
            (math.ceil(self.grace_stages * self.reduction_factor**rung) for rung in itertools.count()),
        )
        return list(dict.fromkeys(rungs))


class SearchSection(Section):
    """What `cdpo tune` tries, on the samples and scores of the run.

    The first objective decides and stops trials early; of several all trials are kept that no other beats in each.
    """

    algorithm: Literal["random", "grid", "tpe"] = "tpe"
    num_trials: Annotated[int, Field(ge=1)] | None = None
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("reward",)
    judge: str | None = None
    stop_early: StopEarly | None = StopEarly()
    max_concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    updates_per_trial: Annotated[int, Field(ge=1)] | None = None
    images_per_prompt: Annotated[int, Field(ge=2)] = 4
    early_prompts: Annotated[int, Field(ge=1)] | None = None
    confirm_seeds: Annotated[int, Field(ge=0)] = 3
    space: Annotated[dict[SearchedKey, KnobSection], Field(min_length=1), AfterValidator(_taken_by_their_fields)]

    @model_validator(mode="after")
    def _trials_are_counted(self) -> "SearchSection":
        faults = []
        if len({*self.objectives}) != len(self.objectives):
            faults.append(f"`objectives` must not repeat one, got {list(self.objectives)}")
        if self.algorithm == "grid":
            if self.num_trials is not None:
                faults.append("`num_trials` must not be given with `algorithm` 'grid', which tries all there are")
            faults += [
                f"`space.{key}` is a range, and a grid has no bounds there; give a list of choices"
                for key, section in self.space.items()
                if section.choices is None
            ]
        elif self.num_trials is None:
            faults.append(f"`num_trials` is missing: how many to try by {self.algorithm!r}")
        if self.updates_per_trial and "curriculum.updates_per_stage" in self.space:
            faults.append(
                "`updates_per_trial` decides how many updates a stage has, so `space` must not hold"
                " `curriculum.updates_per_stage`; leave one of them out"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What is tried, each after those that it depends on."""
        return _knobs(self.space)

    def largest(self, key: str, otherwise: int) -> int:
        """The largest number that a trial may have at a key, which is ``otherwise`` where it is not tried."""
        return max([knob.largest for knob in self.knobs if knob.key == key], default=otherwise)

    def max_updates(self, curriculum: CurriculumSection) -> int:
        """Number of updates of the longest trial."""
        if self.updates_per_trial:
            return self.updates_per_trial
        num_stages = self.largest("curriculum.num_stages", curriculum.num_stages)
        return num_stages * self.largest("curriculum.updates_per_stage", curriculum.updates_per_stage)

    def max_trials(self, plain: Mapping[str, Any]) -> int:
        """Number of trials; of a grid every point, plus the paper's schedule if it is not one of them.

        Args:
            plain: the configuration as plain values, defaults included.
        """
        if self.num_trials is not None:
            return self.num_trials
        apart = {*paper_point(self.knobs, plain)} - {*self.space}
        return sum(1 for _ in grid_points(self.knobs)) + bool(apart)


def paper_point(knobs: Sequence[Knob], plain: Mapping[str, Any]) -> dict[str, Any]:
    """What the first trial, the paper's, tries: of the knobs, and of what else a config chose in another way.

    Args:
        plain: the configuration as plain values, defaults included.
    """
    point: dict[str, Any] = {}
    for knob in knobs:
        if knob.is_active(point):
            point[knob.key] = PAPER_SCHEDULE.get(knob.key, value_at(plain, knob.key))
    searched = {knob.key for knob in knobs}
    return point | {
        key: value for key, value in PAPER_SCHEDULE.items() if key not in searched and value_at(plain, key) != value
    }


def with_point(values: Mapping[str, Any], knobs: Sequence[Knob], point: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's values with those of a point.

    A knob that does not matter at this point is not given, unless it must be; neither is what belongs to another value
    than the point's.

    Args:
        values: as they were given, without defaults.
    """
    changed = {section: copy.deepcopy(given) for section, given in values.items()}
    for knob in knobs:
        if knob.key not in point and not must_be_given(knob.key):
            _remove(changed, knob.key)
    for key, value in point.items():
        _put(changed, key, value)
    for key, (decider, value) in BELONGS_TO.items():
        asked = any(name == key or name.startswith(f"{key}.") for name in point)
        if decider in point and point[decider] != value and not asked:
            _remove(changed, key)
    return changed


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """Of nested values, the one at a key as it is written on the command line."""
    return functools.reduce(operator.getitem, key.split("."), values)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[last] = value


def _remove(values: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.get(parent, {})
    values.pop(last, None)

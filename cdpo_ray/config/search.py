"""A search over schedules: its space, objectives, and budget."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cdpo_ray.config.curriculum import CurriculumSection
from cdpo_ray.config.knobs import (
    Knob,
    as_field,
    default_of,
    grid_points,
    must_be_given,
    number_type,
    ordered,
    why_refused,
)
from cdpo_ray.config.section import Section, named

Objective = Literal["reward", "win_rate", "diversity", "implicit_accuracy"]

PAPER_SCHEDULE: dict[str, Any] = {
    f"curriculum.{name}": info.get_default()
    for name, info in CurriculumSection.model_fields.items()
    if name not in ("num_stages", "updates_per_stage")
}
"""Settings that the paper uses for every model; all others depend on the model and come from the config."""

BELONGS_TO: dict[str, tuple[str, Any]] = {
    "curriculum.window": ("curriculum.pacing", "sliding_window"),
    "curriculum.num_margin_draws": ("curriculum.measure", "margin"),
    "training.lora": ("training.method", "lora"),
}
"""Keys that are only allowed if another key has this value."""


class KnobSection(Section):
    """Values of one key: a list of choices, or a range `{low: ..., high: ...}` of numbers."""

    choices: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """Values to choose from; a plain list in place of the mapping means the same."""

    low: float | None = None
    """Lower end of the range, inclusive."""

    high: float | None = None
    """Upper end of the range, inclusive."""

    log: bool = False
    """Draw uniformly on a logarithmic scale, for keys whose useful values span orders of magnitude, such as
    `training.beta`."""

    when: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Condition: another key of the space, mapped to the value or values for which this key is varied. Empty: always
    varied."""

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
            raise ValueError(f"`low` must be > 0 with `log`, got {self.low:g}")
        return self


def _may_be_searched(key: str) -> str:
    if why := why_refused(key):
        raise ValueError(why)
    return key


def _checked_space(space: dict[str, KnobSection]) -> dict[str, KnobSection]:
    faults: list[str] = []
    taken = {}
    for key, knob in space.items():
        if knob.choices is None and number_type(key) is None:
            faults.append(f"`{key}` is not a number, so it has no range; give a list of choices")
            continue
        values = []
        for value in knob.choices if knob.choices is not None else (knob.low, knob.high):
            try:
                values.append(as_field(key, value))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Input should ").removeprefix("Value error, must ")
                wish, separator, hint = reason.partition("; ")
                faults.append(f"`{key}` must {wish}, got {value!r}{separator}{hint}")
            else:
                if isinstance(values[-1], dict):
                    faults.append(
                        f"`{key}` must be given by name in a search, got {value!r}; vary its options as keys of their"
                        f" own, such as `{key}.{[*values[-1]][-1]}`"
                    )
        changed = {"choices": tuple(values)} if knob.choices is not None else {}
        when = {name: [*given] if isinstance(given, list | tuple) else [given] for name, given in knob.when.items()}
        taken[key] = knob.model_copy(update=changed | {"when": when})
    faults += _faults_of_conditions(taken)
    if not faults and (circle := {*taken} - {knob.key for knob in _knobs(taken)}):
        names = ", ".join(f"`{key}`" for key in taken if key in circle)
        faults.append(f"{names} depend on each other in a circle; remove a `when`")
    if faults:
        raise ValueError("\n".join(faults))
    return taken


def _faults_of_conditions(space: Mapping[str, KnobSection]) -> list[str]:
    faults = []
    for key, section in space.items():
        for name, values in section.when.items():
            if name not in space:
                faults.append(f"`{key}` depends on `{name}`, which is not in the space; add it, or remove the `when`")
            else:
                other = _knob(name, space[name])
                faults += [
                    f"`{key}` depends on `{name}` being {value!r}, which is not in the space: {other.sentence}"
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
    """Early stopping by asynchronous successive halving (ASHA, arXiv:1810.05934) at the ends of stages. `null`: every
    trial runs to its end."""

    reduction_factor: Annotated[float, Field(gt=1)] = 2
    """At each rung, one in this many trials continues; the rungs are after `grace_stages` x `reduction_factor`^n
    stages. Raise it to stop more trials."""

    grace_stages: Annotated[int, Field(ge=1)] = 1
    """Number of stages before a trial can be stopped. Raise it if `curriculum.num_stages` is varied, because trials are
    compared at the same stage, where those with few stages have completed more of their updates."""

    def stages(self, num_stages: int) -> list[int]:
        """Stages after which a trial may be stopped.

        Args:
            num_stages: maximum number of stages of a trial.
        """
        rungs = itertools.takewhile(
            lambda stage: stage < num_stages,
            (math.ceil(self.grace_stages * self.reduction_factor**rung) for rung in itertools.count()),
        )
        return list(dict.fromkeys(rungs))


class SearchSection(Section):
    """Search over schedules by `cdpo tune`, on the samples and scores of one run. The first trial is the paper's
    schedule. `null`: `cdpo tune` cannot be used."""

    algorithm: Literal["random", "grid", "tpe"] = "tpe"
    """How trials are proposed. `tpe`: learns from earlier trials (Optuna). `random`: independent draws. `grid`: every
    point; the space must have choices only."""

    num_trials: Annotated[int, Field(ge=1)] | None = None
    """Number of trials, including the one with the paper's schedule; required for `tpe` and `random`, not allowed for
    `grid`. Raise it to continue a finished search."""

    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("reward",)
    """Quantities to maximise on the validation prompts: `reward`, `win_rate` and `implicit_accuracy` according to
    `judge`, and `diversity` of a prompt's images. The first one chooses the best trial and stops trials early; several
    give a Pareto front."""

    judge: str | None = None
    """Judge of the objectives, one of the evaluation's judges. `null`: the first ranking reward that looks at
    images."""

    stop_early: StopEarly | None = StopEarly()

    max_concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of trials that run at the same time; `null`: as many as the nodes have room for.
    `resources.trainers` determines how many share a GPU."""

    updates_per_trial: Annotated[int, Field(ge=1)] | None = None
    """Number of updates of each trial, divided among its stages, so that all trials cost the same. `null`:
    `curriculum.updates_per_stage` for each stage."""

    images_per_prompt: Annotated[int, Field(ge=2)] = 4
    """Number of images per validation prompt. More images make objectives less noisy, and trials slower."""

    early_prompts: Annotated[int, Field(ge=1)] | None = None
    """Number of validation prompts that are used before a trial's last stage; `null`: all. Fewer make early reports
    cheaper and noisier."""

    confirm_seeds: Annotated[int, Field(ge=0)] = 3
    """Number of new seeds with which the best schedule and the paper's are trained again and measured on the held-out
    prompts, because the best of many trials looks better than it is. One half of these prompts chooses the schedule to
    keep, and the other half judges it. With 1 or 2, there are only means, without intervals or a verdict. 0: no
    confirmation."""

    space: Annotated[dict[SearchedKey, KnobSection], Field(min_length=1), AfterValidator(_checked_space)]
    """Keys to vary, each a key of `curriculum` or `training`, such as `training.beta`, mapped to its values."""

    @model_validator(mode="after")
    def _trials_are_counted(self) -> "SearchSection":
        faults = []
        if len({*self.objectives}) != len(self.objectives):
            faults.append(f"`objectives` must not repeat one, got {list(self.objectives)}")
        if self.algorithm == "grid":
            if self.num_trials is not None:
                faults.append("`num_trials` must not be given with `algorithm` 'grid', which tries every point")
            faults += [
                f"`space.{key}` is a range, but a grid needs choices; give a list of them"
                for key, section in self.space.items()
                if section.choices is None
            ]
        elif self.num_trials is None:
            faults.append(f"`num_trials` is missing: the number of trials of `algorithm` {self.algorithm!r}")
        if self.updates_per_trial and "curriculum.updates_per_stage" in self.space:
            faults.append(
                "`updates_per_trial` decides the number of updates per stage, so `space` must not contain"
                " `curriculum.updates_per_stage`; leave out one of them"
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs of the space, each after those that it depends on."""
        return _knobs(self.space)

    def largest(self, key: str, otherwise: int) -> int:
        """The largest value of a key in any trial; ``otherwise`` if it is not in the space."""
        return max([knob.largest for knob in self.knobs if knob.key == key], default=otherwise)

    def max_updates(self, curriculum: CurriculumSection) -> int:
        """Number of updates of the longest trial."""
        if self.updates_per_trial:
            return self.updates_per_trial
        num_stages = self.largest("curriculum.num_stages", curriculum.num_stages)
        return num_stages * self.largest("curriculum.updates_per_stage", curriculum.updates_per_stage)

    def validated_prompts(self, num_stages: int, num_prompts: int) -> list[int]:
        """Number of prompts that a trial is measured on after each stage, of all validation prompts."""
        return [min(self.early_prompts or num_prompts, num_prompts)] * (num_stages - 1) + [num_prompts]

    def max_trials(self, plain: Mapping[str, Any]) -> int:
        """Number of trials; for a grid every point, plus the paper's schedule if it is not one of them.

        Args:
            plain: the configuration as plain values, defaults included.
        """
        if self.num_trials is not None:
            return self.num_trials
        apart = {*paper_point(self.knobs, plain)} - {*self.space}
        return sum(1 for _ in grid_points(self.knobs)) + bool(apart)


def paper_point(knobs: Sequence[Knob], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Point of the first trial, the paper's schedule: the knobs, and other keys that the config sets differently.

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
    """The values of a configuration, changed to those of a point.

    Inactive knobs without a required value are removed, and so are keys that belong to another value than the point's.

    Args:
        values: given values, without defaults.
    """
    changed = {section: copy.deepcopy(given) for section, given in values.items()}
    for knob in knobs:
        if knob.key not in point and not must_be_given(knob.key):
            _remove(changed, knob.key)
    for key, value in point.items():
        _put(changed, key, value)
    for key, (decider, value) in BELONGS_TO.items():
        is_given = any(name == key or name.startswith(f"{key}.") for name in point)
        if decider in point and point[decider] != value and not is_given:
            _remove(changed, key)
    return changed


def value_at(values: Mapping[str, Any], key: str) -> Any:
    """The value of a key, written as on the command line, in nested values; of a variant its name.

    An option that the variant in ``values`` does not have has its default.
    """
    *parents, last = key.split(".")
    for parent in parents:
        values = named(values[parent])
    found = values[last] if last in values else default_of(key)
    return found["name"] if isinstance(found, dict) and "name" in found else found


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value; a variant keeps its options if it keeps its name."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = named(values.get(parent, {}))
        values[parent] = inner
        values = inner
    before = values.get(last)
    if not (isinstance(before, dict) and before.get("name") == value):
        values[last] = value


def _remove(values: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = named(values.get(parent, {}))
    values.pop(last, None)

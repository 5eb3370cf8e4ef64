"""Config -> search space; a point of the space -> the configuration of one trial."""

from cdpo_ray.config import Config, SearchSection, validate
from cdpo_ray.config.curriculum import CurriculumSection
from cdpo_ray.config.knobs import Knob
from cdpo_ray.config.search import paper_point, with_point
from cdpo_ray.errors import ConfigError, printable
from cdpo_ray.search.trials import Point
from cdpo_ray.user_code import USER_FUNCTION

__all__ = ["Knob", "Space", "config_of", "first_point", "is_in", "run_of", "space_of"]

Space = tuple[Knob, ...]
"""Knobs, each after those that it depends on."""


def space_of(config: Config) -> Space:
    return _search(config).knobs


def is_in(space: Space, point: Point) -> bool:
    """Whether every active knob of a point has a value within its range or choices."""
    return all(knob.key in point and knob.holds(point[knob.key]) for knob in space if knob.is_active(point))


def first_point(config: Config) -> Point:
    """Point of the first trial: the paper's values of all keys that do not depend on the model.

    Keys that depend on the model, such as the number of stages and beta, have the config's values. If the config
    departs from the paper in a key that no trial varies, the point contains that key too.
    """
    return paper_point(space_of(config), config.plain())


def run_of(config: Config) -> str:
    """Folder of the search's own run, whose images and scores the trials use."""
    return f"{config.run.dir.rstrip('/')}/{config.run.name}"


def config_of(config: Config, point: Point, *, name: str, run_dir: str, seed: int | None = None) -> Config:
    """The configuration of one trial, which is an ordinary run.

    Args:
        config: configuration of the search.
        point: values of the trial.
        name: name of the trial's run.
        run_dir: parent folder of the run.
        seed: `training.seed`; `None`: the config's.

    Raises:
        ConfigError: the values of the point are not valid together; one line per error.
    """
    search = _search(config)
    given = config.model_dump(mode="json", exclude_unset=True, exclude={"search"})
    values = with_point(given, search.knobs, point)
    values["run"] |= {"name": name, "dir": run_dir, "samples_from": run_of(config)}
    if seed is not None:
        values["training"]["seed"] = seed
    if search.updates_per_trial:
        curriculum = values["curriculum"]
        num_stages = curriculum.get("num_stages", CurriculumSection.model_fields["num_stages"].default)
        curriculum["updates_per_stage"] = search.updates_per_trial // num_stages
    where = f"{run_dir.rstrip('/')}/{name}"
    trial = validate(values, where=where)
    _refuse_other_functions(config, trial, where)
    return trial


def _refuse_other_functions(config: Config, trial: Config, where: str) -> None:
    """A point may come from another person's `trial.json`, which must not choose the code that is imported."""
    named = [config.curriculum.measure, config.training.loss.name]
    named += [choice for knob in _search(config).knobs for choice in knob.choices]
    for key, name in (("curriculum.measure", trial.curriculum.measure), ("training.loss", trial.training.loss.name)):
        if USER_FUNCTION.match(name) and name not in named:
            raise ConfigError(
                f"{where}: `{key}` {printable(name)!r} is a function that neither the configuration nor its"
                " `search.space` names; delete the trial's folder"
            )


def _search(config: Config) -> SearchSection:
    assert config.search is not None, "checked by the caller"
    return config.search

"""Points of the search space -> configurations of trials."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdpo_ray.config import Config, load_config, parse_yaml, validate
from cdpo_ray.config.knobs import REFUSED, searched_keys
from cdpo_ray.errors import ConfigError
from cdpo_ray.search.space import Knob, config_of, first_point

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SPACE = {
    "curriculum.num_stages": [1, 2, 4, 6],
    "training.beta": {"low": 50, "high": 1000, "log": True},
    "curriculum.window": {"choices": [1, 2, 3], "when": {"curriculum.pacing": "sliding_window"}},
    "curriculum.pacing": ["cumulative", "sliding_window"],
    "training.lora.rank": {"low": 2, "high": 16},
}


def config(space: dict[str, Any] = SPACE, *overrides: str, **search: Any) -> Config:
    """The quickstart with a search over ``space``."""
    values = parse_yaml(QUICKSTART.read_text(), where="quickstart")
    values["prompts"]["validation"] = {"source": "scenes", "count": 8}
    values["search"] = {"num_trials": 4, "space": space} | search
    for override in overrides:
        key, _, value = override.partition("=")
        *parents, name = key.split(".")
        section = functools.reduce(lambda inner, parent: inner.setdefault(parent, {}), parents, values)
        section[name] = yaml.safe_load(value)
    return validate(values, where="quickstart")


def trial(searched: Config, point: dict[str, Any], seed: int | None = None) -> Config:
    return config_of(searched, point, name="003", run_dir="runs/quickstart/trials", seed=seed)


def test_every_field_is_either_searchable_or_refused_with_a_reason() -> None:
    searched = set(searched_keys())
    assert {"curriculum.order", "training.loss", "training.lora.rank", "training.guidance_range"} <= searched
    assert not searched & {*REFUSED} and not any(key.startswith(("run.", "model.")) for key in searched)
    plain = load_config(QUICKSTART).plain()
    sections = ("lora", "schedule", "health")
    leaves = {f"{name}.{key}" for name in ("curriculum", "training") for key in plain[name] if key not in sections}
    leaves |= {f"training.{section}.{key}" for section in sections for key in plain["training"][section]}
    leaves -= {"training.timesteps"}  # of its values, a search varies the ends of a range
    leaves |= {"training.timesteps.low", "training.timesteps.high"}
    leaves |= {f"training.loss.{key}" for key in ("name", "options", "sft_weight", "label_smoothing")}
    assert leaves == searched | {*REFUSED}


@pytest.mark.parametrize(
    ("knob", "inside", "outside"),
    [
        (Knob("a", (1, "x", None, [2])), [1, "x", None, [2]], [2, "y", 0]),
        (Knob("a", low=0.5, high=2.0), [0.5, 1, 2.0], [0.49, 2.1, None, "1", True]),
        (Knob("a", low=2, high=4, is_integer=True), [2, 3, 4, 3.0], [1, 5, 2.5, True]),
    ],
)
def test_a_knob_holds_only_its_choices_or_range(knob: Knob, inside: list[Any], outside: list[Any]) -> None:
    assert all(knob.holds(value) for value in inside)
    assert not any(knob.holds(value) for value in outside)


def test_the_papers_trial_has_the_papers_choices_and_the_configs_model_dependent_values() -> None:
    everything = SPACE | {"curriculum.order": ["easy_to_hard", "none"], "curriculum.label_noise": [0, 0.1]}
    searched = config(everything, "curriculum.order=none", "curriculum.label_noise=0.1", "training.beta=300")
    assert first_point(searched) == {
        "curriculum.num_stages": 4,
        "training.beta": 300,
        "curriculum.pacing": "cumulative",
        "training.lora.rank": 8,
        "curriculum.order": "easy_to_hard",
        "curriculum.label_noise": 0.0,
    }, "the window belongs to another pacing"


def test_the_papers_trial_has_the_papers_values_also_for_keys_that_no_trial_varies() -> None:
    beta = {"training.beta": [100, 200]}
    assert first_point(config(beta)) == {"training.beta": 200}
    departs = config(beta, "curriculum.pacing=sliding_window", "curriculum.window=3", "curriculum.min_score_gap=0.5")
    assert first_point(departs) == {
        "training.beta": 200,
        "curriculum.pacing": "cumulative",
        "curriculum.window": None,
        "curriculum.min_score_gap": 0.0,
    }
    for searched in (departs, config(beta, "curriculum.preset=released-code"), config(beta, "curriculum.order=none")):
        found = trial(searched, first_point(searched)).curriculum
        expected = load_config(QUICKSTART).curriculum
        assert found == expected, "the quickstart's schedule is the paper's"
        assert trial(searched, {"training.beta": 100}).curriculum == searched.curriculum


def test_a_trial_is_an_ordinary_run_on_the_images_of_the_search() -> None:
    point = {
        "curriculum.num_stages": 2,
        "training.beta": 77.5,
        "curriculum.pacing": "sliding_window",
        "curriculum.window": 1,
        "training.lora.rank": 3,
    }
    searched = config()
    found = trial(searched, point, seed=9)
    assert (found.run.name, found.run.dir, found.run.samples_from) == (
        "003",
        "runs/quickstart/trials",
        "runs/quickstart",
    )
    assert (found.run.seed, found.training.seed, found.search) == (searched.run.seed, 9, None)
    assert (found.curriculum.pacing, found.curriculum.window, found.curriculum.num_stages) == ("sliding_window", 1, 2)
    assert (found.training.beta, found.training.lora.rank, found.curriculum.updates_per_stage) == (77.5, 3, 50)
    same = found.plain()
    for key in ("run", "curriculum", "training", "search"):
        same[key] = searched.plain()[key]
    assert same == searched.plain()
    assert trial(searched, point).training.seed is None
    assert validate(yaml.safe_load(yaml.safe_dump(found.plain())), where="plain") == found


@pytest.mark.parametrize(("num_stages", "updates"), [(1, 160), (2, 80), (4, 40), (6, 26)])
def test_the_updates_of_a_trial_are_divided_among_its_stages(num_stages: int, updates: int) -> None:
    found = trial(config(updates_per_trial=160), {"curriculum.num_stages": num_stages})
    assert found.curriculum.updates_per_stage == updates
    without = {key: knob for key, knob in SPACE.items() if key != "curriculum.num_stages"}
    assert trial(config(without, updates_per_trial=160), {}).curriculum.updates_per_stage == 40


def test_inactive_knobs_have_no_value_in_the_configuration() -> None:
    searched = config(SPACE, "curriculum.pacing=sliding_window", "curriculum.window=3")
    found = trial(searched, {"curriculum.pacing": "cumulative"}).curriculum
    assert (found.pacing, found.window) == ("cumulative", None)
    unnamed = config({"curriculum.pacing": SPACE["curriculum.pacing"]}, "curriculum.pacing=sliding_window")
    assert trial(unnamed, {"curriculum.pacing": "cumulative"}).curriculum.window is None
    assert trial(unnamed, {"curriculum.pacing": "sliding_window"}).curriculum.window == 2
    losses = {
        "training.loss": ["dpo", "robust", "sft"],
        "training.loss.label_smoothing": {"choices": [0.1, 0.2], "when": {"training.loss": "robust"}},
        "training.beta": {"choices": [100, 200], "when": {"training.loss": ["dpo", "robust"]}},
    }
    searched = config(losses, "training.loss={name: robust, label_smoothing: 0.1, sft_weight: 0.2}")
    for smoothing in (0.1, 0.2):
        kept = trial(searched, {"training.loss": "robust", "training.loss.label_smoothing": smoothing}).training
        assert kept.loss.options_of_function == {"label_smoothing": smoothing} and kept.loss.sft_weight == 0.2
    found = trial(searched, {"training.loss": "sft"}).training
    assert (found.loss.arguments["loss"], found.beta) == ("sft", 200), "beta must be given"
    assert trial(config({"training.method": ["lora", "full"]}), {"training.method": "full"}).training.method == "full"


def test_invalid_combinations_are_reported_one_per_line() -> None:
    searched = config(SPACE | {"curriculum.measure": ["rank_gap", "margin"], "curriculum.num_stages": [4, 9]})
    with pytest.raises(ConfigError, match=r"runs/quickstart/trials/003: 1 fault\n.*have only 7 rank gaps"):
        trial(searched, {"curriculum.num_stages": 9})
    with pytest.raises(ConfigError, match=r"`measure` 'margin' needs `boundaries` 'equal_count'"):
        trial(searched, {"curriculum.measure": "margin"})


def test_the_space_needs_neither_torch_nor_ray_nor_optuna() -> None:
    code = (
        "import sys; import cdpo_ray.search.space;"
        "print(sorted({'torch', 'ray', 'optuna', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_loss_with_options_is_refused_as_a_choice() -> None:
    with pytest.raises(ConfigError, match=r"`training.loss` must be given by name in a search.*`training.loss.label_s"):
        config({"training.loss": ["dpo", {"name": "robust", "label_smoothing": 0.2}]})


def test_the_first_trial_has_the_options_of_the_configs_loss() -> None:
    smoothing = {"training.loss": ["dpo", "robust"], "training.loss.label_smoothing": [0.1, 0.2]}
    searched = config(smoothing, "training.loss={name: robust, label_smoothing: 0.2}")
    assert first_point(searched) == {"training.loss": "robust", "training.loss.label_smoothing": 0.2}


@pytest.mark.parametrize(
    "point",
    [
        {"training.loss": "os:abort"},
        {"training.loss": {"name": "os:abort"}},
        {"training.loss.name": "os:abort"},
        {"curriculum.measure": "os:abort"},
    ],
)
def test_fault_29_a_trial_of_someone_else_cannot_choose_a_function(point: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"trials/003: `.*` 'os:abort' is a function that neither the configuration"):
        trial(config({"training.beta": [100, 200]}), point)
    own = config({"training.loss": ["dpo", "mine:f"], "training.beta": [100, 200]}, "curriculum.measure=mine:g")
    assert trial(own, {"training.loss": "mine:f"}).training.loss.name == "mine:f"

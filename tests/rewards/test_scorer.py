"""Rewards behind one call: whoever fails is named."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cdpo_ray.config import RewardsSection
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards import REWARDS
from cdpo_ray.rewards.scorer import Scorer, load_reward

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
PROMPTS = ["a cat", "a dog"]
OWN = '''"""Rewards of one's own."""

import torch


def mean(images, prompts):
    return images.float().mean(dim=(1, 2, 3))


def as_list(images, prompts):
    return [len(prompt) for prompt in prompts]


def one_number(images, prompts):
    return 3.0


def a_column(images, prompts):
    return torch.zeros(len(prompts), 1)


def words(images, prompts):
    return prompts


def breaks(images, prompts):
    return images / broken


def not_a_number(images, prompts):
    return torch.tensor([float("nan"), float("inf")])
'''


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module in the folder that the command is started in, not on the path."""
    path = tmp_path / "own_rewards_of_a_test.py"
    path.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    sys.modules.pop(path.stem, None)


def test_ones_own_function_is_found_in_the_working_folder_and_called() -> None:
    scores = Scorer({"own_rewards_of_a_test:mean": {}, "own_rewards_of_a_test:as_list": {}})(IMAGES, PROMPTS)
    assert scores["own_rewards_of_a_test:mean"].tolist() == [23.5, 71.5]
    assert scores["own_rewards_of_a_test:as_list"].tolist() == [5.0, 5.0]
    assert {values.dtype for values in scores.values()} == {np.dtype(np.float64)}


def test_several_rewards_keep_their_order_and_their_options() -> None:
    scorer = Scorer({"own_rewards_of_a_test:mean": {}, "jpeg_size": {"quality": 20}})
    assert list(scorer(IMAGES, PROMPTS)) == ["own_rewards_of_a_test:mean", "jpeg_size"]
    assert scorer.rewards["jpeg_size"].quality == 20  # type: ignore[attr-defined]


def test_a_reward_that_raises_is_named_with_its_error_and_its_line(own_module: Path) -> None:
    line = 1 + OWN.split("\n").index("    return images / broken")
    with pytest.raises(RewardError, match="raised") as caught:
        Scorer({"own_rewards_of_a_test:breaks": {}})(IMAGES, PROMPTS)
    assert str(caught.value) == (
        f"reward `own_rewards_of_a_test:breaks` raised NameError: name 'broken' is not defined at {own_module}:{line}"
    )


def test_a_score_that_is_no_number_is_the_rewards_fault() -> None:
    with pytest.raises(RewardError, match=r"reward `own_rewards_of_a_test:words` raised ValueError: could not convert"):
        Scorer({"own_rewards_of_a_test:words": {}})(IMAGES, PROMPTS)


@pytest.mark.parametrize(("function", "shape"), [("one_number", r"\[\]"), ("a_column", r"\[2, 1\]")])
def test_scores_of_another_shape_are_refused(function: str, shape: str) -> None:
    message = rf"reward `own_rewards_of_a_test:{function}`: must return one score an image, \[2\], got shape {shape}"
    with pytest.raises(RewardError, match=message):
        Scorer({f"own_rewards_of_a_test:{function}": {}})(IMAGES, PROMPTS)


def test_scores_that_are_not_finite_are_passed_on_to_be_counted() -> None:
    scores = Scorer({"own_rewards_of_a_test:not_a_number": {}})(IMAGES, PROMPTS)["own_rewards_of_a_test:not_a_number"]
    assert np.isnan(scores[0]) and np.isposinf(scores[1])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module_at_all:f", "No module named 'no_such_module_at_all'"),
        ("own_rewards_of_a_test:no_such_function", "has no attribute 'no_such_function'"),
    ],
)
def test_a_reward_that_is_not_there_is_named_with_where_it_may_lie(name: str, reason: str) -> None:
    with pytest.raises(
        RewardError, match=rf"reward `{name}`: cannot be imported: .*{reason}.*; the module must be installed"
    ):
        load_reward(name, {})


@pytest.mark.parametrize("name", ["jpeg_size", "oracle", "oracle_strict"])
def test_a_builtin_reward_is_called_by_its_name(name: str) -> None:
    reward = load_reward(name, {})
    assert f"{type(reward).__module__}:{type(reward).__name__}" == REWARDS[name]


@pytest.mark.parametrize(("name", "where"), REWARDS.items())
def test_the_config_gives_each_builtin_reward_the_arguments_it_takes(name: str, where: str) -> None:
    module, _, kind = where.partition(":")
    options = RewardsSection(names=[name]).options(name)
    inspect.signature(getattr(importlib.import_module(module), kind)).bind(**options)


def test_fault_50_in_the_working_folder_only_the_module_that_is_named_hides_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("this", "sched"):  # of the standard library
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text("def score(images, prompts):\n    return [7.0] * len(prompts)\n")
    load_reward("jpeg_size", {})
    assert str(tmp_path) not in sys.path
    assert list(load_reward("this:score", {})(IMAGES, PROMPTS)) == [7.0, 7.0]
    assert importlib.import_module("sched").__file__ != str(tmp_path / "sched.py")
    monkeypatch.delitem(sys.modules, "this")


def test_an_own_module_that_fails_is_imported_again(tmp_path: Path) -> None:
    path = tmp_path / "fails_at_first.py"
    path.write_text("import no_such_package")
    with pytest.raises(RewardError, match="No module named 'no_such_package'"):
        load_reward("fails_at_first:score", {})
    path.write_text("def score(images, prompts):\n    return [7.0] * len(prompts)\n")
    assert load_reward("fails_at_first:score", {})(IMAGES, PROMPTS)
    del sys.modules["fails_at_first"]

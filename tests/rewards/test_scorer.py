"""Rewards behind one call: a failing reward is reported by name."""

import importlib
import inspect
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cdpo_ray.config import REWARDS, RewardsSection
from cdpo_ray.curriculum.noise import score_noise
from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.scorer import PixelScorer, Scorer, batches_of, load_reward

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
PROMPTS = ["a cat", "a dog"]
OWN = '''"""Rewards of a user."""

import sys

import numpy as np
import torch


def mean(images, prompts):
    return images.float().mean(dim=(1, 2, 3))


def as_list(images, prompts):
    return [len(prompt) for prompt in prompts]


def one_number(images, prompts):
    return 3.0


def a_square(images, prompts):
    return torch.zeros(len(prompts), len(prompts))


def nothing(images, prompts):
    return None


def two_scores(images, prompts):
    return mean(images, prompts), mean(images, prompts)


def words(images, prompts):
    return prompts


def breaks(images, prompts):
    return images / broken


def leaves(images, prompts):
    raise SystemExit("cannot start")


def not_a_number(images, prompts):
    return torch.tensor([float("nan"), float("inf")])


def a_column(images, prompts):
    return mean(images, prompts)[:, None]


def a_row(images, prompts):
    return mean(images, prompts)[None]


def squeezed(images, prompts):
    return mean(images, prompts)[:, None].squeeze()


def in_bfloat16(images, prompts):
    return mean(images, prompts).bfloat16()


def with_gradients(images, prompts):
    return mean(images, prompts).requires_grad_()


def half(images, prompts):
    return mean(images, prompts).half().numpy()


def with_info(images, prompts):
    return mean(images, prompts), {"model": "mine"}


def with_more(images, prompts):
    return mean(images, prompts), None, prompts


def with_seconds(images, prompts):
    return mean(images, prompts), 0.5


def in_a_mapping(images, prompts):
    return {"scores": mean(images, prompts), "logits": torch.zeros(len(prompts), 2)}


def mean_and_deviation(images, prompts):
    return torch.stack([mean(images, prompts), images.float().std(dim=(1, 2, 3))], dim=1)


def by_aspect(images, prompts):
    return {"quality": mean(images, prompts), "alignment": mean(images, prompts)}


def scaled(images, prompts, factor=1.0):
    return factor * mean(images, prompts)


def list_of_tensors(images, prompts):
    return [image.float().mean().requires_grad_() for image in images]


buffer = np.zeros(2)


def in_a_buffer(images, prompts):
    buffer[:] = mean(images, prompts)
    return buffer


class Mean:
    def __call__(self, images, prompts):
        return mean(images, prompts)


class Module(torch.nn.Module):
    def forward(self, images, prompts):
        return mean(images, prompts)


class WithArguments(Mean):
    made = 0

    def __init__(self, path):
        self.path = path
        WithArguments.made += 1


class NotCalled:
    def __init__(self):
        raise AssertionError("a class of instances that cannot be called is not instantiated")


def modifies_its_inputs(images, prompts):
    scores = mean(images, prompts)
    images.zero_()
    prompts.sort()
    prompts[0] = "changed"
    return scores


def of_two(images, prompts):
    if len(images) > 2:
        torch.empty(10**17, dtype=torch.uint8)
    return mean(images, prompts)


def of_none(images, prompts):
    raise MemoryError("no room")


class Whole:
    """Brightness beyond the mean of the prompt's images in the call."""

    whole_prompts = True

    def __call__(self, images, prompts):
        values = mean(images, prompts).double().numpy()
        prompts = np.array(prompts)
        return [value - values[prompts == prompt].mean() for value, prompt in zip(values, prompts)]


class Heavy(Whole):
    def __call__(self, images, prompts):
        raise MemoryError("no room")


def normalized(images, prompts):
    values = mean(images, prompts)
    return (values - values.mean()) / (values.std() + 1e-6)


def ranked(images, prompts):
    return mean(images, prompts).argsort().argsort()
'''
MODULE = "own_rewards_of_a_test"


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module in the working directory that is not on the import path."""
    path = tmp_path / "own_rewards_of_a_test.py"
    path.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield path
    sys.modules.pop(path.stem, None)


def test_a_users_function_is_found_in_the_working_directory_and_called() -> None:
    scores = Scorer({"own_rewards_of_a_test:mean": {}, "own_rewards_of_a_test:as_list": {}})(IMAGES, PROMPTS)
    assert scores["own_rewards_of_a_test:mean"].tolist() == [23.5, 71.5]
    assert scores["own_rewards_of_a_test:as_list"].tolist() == [5.0, 5.0]
    assert {values.dtype for values in scores.values()} == {np.dtype(np.float64)}


def test_several_rewards_keep_their_order_and_their_options() -> None:
    scorer = Scorer({"own_rewards_of_a_test:mean": {}, "jpeg_size": {"quality": 20}})
    assert list(scorer(IMAGES, PROMPTS)) == ["own_rewards_of_a_test:mean", "jpeg_size"]
    assert scorer.rewards["jpeg_size"].quality == 20  # type: ignore[attr-defined]


def test_a_reward_that_raises_is_reported_with_error_and_line(own_module: Path) -> None:
    line = 1 + OWN.split("\n").index("    return images / broken")
    with pytest.raises(RewardError, match="raised") as caught:
        Scorer({"own_rewards_of_a_test:breaks": {}})(IMAGES, PROMPTS)
    assert str(caught.value) == (
        f"reward `own_rewards_of_a_test:breaks` raised NameError: name 'broken' is not defined at {own_module}:{line}"
    )


@pytest.mark.parametrize(
    "name",
    [
        "a_column", "a_row", "squeezed", "in_bfloat16", "with_gradients", "half", "with_info", "with_more",
        "with_seconds", "in_a_mapping", "list_of_tensors", "Mean", "Module",
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_images", [1, 2])
def test_usual_shapes_and_types_of_scores_are_accepted(name: str, num_images: int) -> None:
    scores = Scorer({f"{MODULE}:{name}": {}})(IMAGES[:num_images], PROMPTS[:num_images])[f"{MODULE}:{name}"]
    np.testing.assert_allclose(scores, [23.5, 71.5][:num_images], rtol=1 / 256 if name == "in_bfloat16" else 0)
    assert scores.dtype == np.float64


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("one_number", "float"),
        ("nothing", "NoneType"),
        ("a_square", r"Tensor of shape \[2, 2\], torch\.float32"),
        ("mean_and_deviation", r"Tensor of shape \[2, 2\], torch\.float32"),
        ("by_aspect", r"a dict with the keys \['quality', 'alignment'\], not one of scores, score, rewards, reward"),
        ("two_scores", r"a tuple of 2 items \(Tensor\)"),
        ("words", r"a list of 2 items \(str\)"),
    ],
)
def test_other_return_values_are_refused_with_a_description(name: str, got: str) -> None:
    message = (
        rf"^reward `{MODULE}:{name}`: must return one score per image, a tensor, an array or a list of 2 numbers,"
        rf" got {got}$"
    )
    with pytest.raises(RewardError, match=message):
        Scorer({f"{MODULE}:{name}": {}})(IMAGES, PROMPTS)


def test_scores_survive_a_reward_that_reuses_its_buffer() -> None:
    scorer = Scorer({f"{MODULE}:in_a_buffer": {}})
    first = scorer(IMAGES, PROMPTS)[f"{MODULE}:in_a_buffer"]
    scorer(IMAGES + 1, PROMPTS)
    assert first.tolist() == [23.5, 71.5]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("WithArguments", r"raised TypeError: .*missing 1 required positional argument: 'path'"),
        ("NotCalled", r"must be a function of images and prompts, or a class of such callables, got NotCalled"),
        ("buffer", r"must be a function of images and prompts, .* got ndarray"),
    ],
)
def test_a_reward_that_is_not_callable_is_reported(name: str, reason: str) -> None:
    with pytest.raises(RewardError, match=rf"^reward `{MODULE}:{name}`:? {reason}"):
        load_reward(f"{MODULE}:{name}", {})


def test_arguments_reach_a_class_once_and_a_function_in_each_call() -> None:
    mean, own = f"{MODULE}:scaled", f"{MODULE}:WithArguments"
    scorer = Scorer({mean: {"factor": 2.0}, own: {"path": "weights"}})
    for _ in range(2):
        assert scorer(IMAGES, PROMPTS)[mean].tolist() == [47.0, 143.0]
    reward = scorer.rewards[own]
    assert (reward.path, type(reward).made) == ("weights", 1)  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match=rf"^reward `{mean}` raised TypeError: .*unexpected keyword argument 'size'"):
        Scorer({mean: {"size": 2}})(IMAGES, PROMPTS)


def test_the_config_gives_arguments_to_own_rewards_only() -> None:
    section = RewardsSection(names=[f"{MODULE}:scaled", "jpeg_size"], arguments={f"{MODULE}:scaled": {"factor": 2.0}})
    assert section.judges == {f"{MODULE}:scaled": {"factor": 2.0}, "jpeg_size": {"quality": 90}}


def test_fault_44_a_reward_that_modifies_its_inputs_changes_nothing() -> None:
    images, prompts = IMAGES.clone(), list(PROMPTS[::-1])
    names = [f"{MODULE}:{name}" for name in ("modifies_its_inputs", "mean", "as_list")]
    scores = Scorer({name: {} for name in names})(images, prompts)
    assert torch.equal(images, IMAGES) and prompts == PROMPTS[::-1]
    assert scores[names[0]].tolist() == scores[names[1]].tolist() == [23.5, 71.5]
    assert scores[names[2]].tolist() == [5, 5]


def rows_of(num_prompts: int, num_samples: int) -> pa.Table:
    pixels = np.random.default_rng(0).integers(1, 256, (num_prompts, num_samples, 3, 4, 4), np.uint8)
    return pa.table({"prompt": ["a cat"] * num_prompts, "pixels": tensor_column(pixels)})


@pytest.mark.parametrize("images_per_batch", [2, 3, 4, 8, 16, 100])
@pytest.mark.parametrize(("num_prompts", "num_samples"), [(2, 4), (5, 2), (4, 4)])
def test_fault_45_mixed_batches_reveal_a_score_that_depends_on_the_batch(
    num_prompts: int, num_samples: int, images_per_batch: int
) -> None:
    rewards = {f"{MODULE}:{name}": {} for name in ("mean", "normalized", "ranked")}
    rows = rows_of(num_prompts, num_samples)
    first, second = (
        {name: np.array(scored[f"score_{name}"].to_pylist()) for name in rewards}
        for mixed in (False, True)
        for scored in [PixelScorer(rewards, images_per_batch, mixed=mixed)(rows)]
    )
    noise = {name.partition(":")[2]: score_noise(first[name], second[name]) for name in rewards}
    assert noise["mean"] == 0 and noise["normalized"] > 0.01 and noise["ranked"] > 0.1


@pytest.mark.parametrize("num_images", [1, 2, 3, 16, 127, 128])
@pytest.mark.parametrize("images_per_batch", [1, 2, 3, 16, 200])
def test_batches_hold_each_image_once_and_respect_the_limit(num_images: int, images_per_batch: int) -> None:
    for mixed in (False, True):
        batches = [one.tolist() for one in batches_of(num_images, images_per_batch, mixed=mixed)]
        assert sorted(number for batch in batches for number in batch) == list(range(num_images))
        assert all(0 < len(batch) <= images_per_batch for batch in batches)
    if num_images > 2 and images_per_batch > 1:
        assert all(1 not in np.diff(batch) for batch in batches), "no two neighbours"
        assert all(len(batch) > 1 for batch in batches[:-1])


@pytest.mark.parametrize("images_per_batch", [1, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_reward_that_compares_images_gets_whole_prompts_also_if_another_is_scored_in_smaller_batches(
    images_per_batch: int, mixed: bool
) -> None:
    rows = rows_of(5, 4)
    rows = rows.set_column(0, "prompt", pa.array([f"prompt {number}" for number in range(5)]))
    rewards = {f"{MODULE}:Whole": {}, f"{MODULE}:mean": {}}
    scored = PixelScorer(rewards, images_per_batch, mixed=mixed)(rows)
    whole = np.array(scored[f"score_{MODULE}:Whole"].to_pylist())
    pixels = rows["pixels"].combine_chunks().to_numpy_ndarray().astype(float)
    means = pixels.mean(axis=(2, 3, 4))
    np.testing.assert_allclose(whole, means - means.mean(axis=1, keepdims=True), atol=1e-4)
    np.testing.assert_allclose(np.array(scored[f"score_{MODULE}:mean"].to_pylist()), means, rtol=1e-6)


def test_mixed_batches_of_whole_prompts_have_their_images_in_reverse_order() -> None:
    found = batches_of(12, 8, mixed=True, together=4)
    assert [batch.tolist() for batch in found] == [[3, 2, 1, 0, 11, 10, 9, 8], [7, 6, 5, 4]]
    found = batches_of(12, 8, mixed=False, together=4)
    assert [batch.tolist() for batch in found] == [list(range(8)), list(range(8, 12))]


def test_a_reward_that_compares_images_is_not_called_with_fewer_when_memory_runs_out() -> None:
    with pytest.raises(RewardError, match=rf"reward `{MODULE}:Heavy`: out of memory with the images of a prompt: "):
        PixelScorer({f"{MODULE}:Heavy": {}}, 8)(rows_of(1, 4))


def test_fault_36_a_black_image_has_no_score() -> None:
    images = torch.cat([torch.zeros(1, 3, 4, 4, dtype=torch.uint8), IMAGES])
    images[1] = 0
    images[1, 2, 3, 3] = 1
    scores = Scorer({f"{MODULE}:mean": {}})(images, ["a cat", *PROMPTS])[f"{MODULE}:mean"]
    np.testing.assert_allclose(scores, [np.nan, 1 / 48, 71.5])


def test_fault_61_a_reward_that_raises_system_exit_is_reported(own_module: Path) -> None:
    line = 1 + OWN.split("\n").index('    raise SystemExit("cannot start")')
    message = rf"^reward `{MODULE}:leaves` raised SystemExit: cannot start at {own_module}:{line}$"
    with pytest.raises(RewardError, match=message):
        Scorer({f"{MODULE}:leaves": {}})(IMAGES, PROMPTS)
    own_module.write_text("\nraise SystemExit(3)\n")
    sys.modules.pop(own_module.stem, None)
    with pytest.raises(RewardError, match=rf"^reward `{MODULE}:leaves` raised SystemExit: 3 at {own_module}:2$"):
        load_reward(f"{MODULE}:leaves", {})


def test_fault_61_a_reward_out_of_memory_gets_fewer_images_and_is_reported_at_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images, scorer = IMAGES.repeat(3, 1, 1, 1)[:5], Scorer({f"{MODULE}:of_two": {}})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert scorer(images, ["a"] * 5)[f"{MODULE}:of_two"].tolist() == [23.5, 71.5, 23.5, 71.5, 23.5]
    assert caplog.messages == [f"reward `{MODULE}:of_two`: out of memory with 5 images at once, retrying with 2"]
    with pytest.raises(
        RewardError,
        match=rf"^reward `{MODULE}:of_none`: out of memory with one image: more memory needed than available",
    ):
        Scorer({f"{MODULE}:of_none": {}})(images, ["a"] * 5)


def test_non_finite_scores_are_passed_on_to_be_counted() -> None:
    scores = Scorer({"own_rewards_of_a_test:not_a_number": {}})(IMAGES, PROMPTS)["own_rewards_of_a_test:not_a_number"]
    assert np.isnan(scores[0]) and np.isposinf(scores[1])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module_at_all:f", "No module named 'no_such_module_at_all'"),
        ("own_rewards_of_a_test:no_such_function", "has no attribute 'no_such_function'"),
    ],
)
def test_a_missing_reward_is_reported_with_advice(name: str, reason: str) -> None:
    with pytest.raises(
        RewardError, match=rf"reward `{name}`: cannot be imported: .*{reason}.*; the module must be installed"
    ):
        load_reward(name, {})


@pytest.mark.parametrize("name", ["jpeg_size", "oracle", "oracle_strict"])
def test_a_builtin_reward_is_called_by_its_name(name: str) -> None:
    reward = load_reward(name, {})
    assert f"{type(reward).__module__}:{type(reward).__name__}" == REWARDS[name]


@pytest.mark.parametrize(("name", "where"), REWARDS.items())
def test_the_config_provides_the_arguments_of_each_builtin_reward(name: str, where: str) -> None:
    module, _, kind = where.partition(":")
    options = RewardsSection(names=[name]).options(name)
    inspect.signature(getattr(importlib.import_module(module), kind)).bind(**options)


def test_fault_50_only_the_named_module_in_the_working_directory_hides_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("this", "sched"):  # modules of the standard library
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text("def score(images, prompts):\n    return [7.0] * len(prompts)\n")
    load_reward("jpeg_size", {})
    assert str(tmp_path) not in sys.path
    assert list(load_reward("this:score", {})(IMAGES, PROMPTS)) == [7.0, 7.0]
    assert importlib.import_module("sched").__file__ != str(tmp_path / "sched.py")
    monkeypatch.delitem(sys.modules, "this")


def test_a_users_module_that_failed_is_imported_again(tmp_path: Path) -> None:
    path = tmp_path / "fails_at_first.py"
    path.write_text("import no_such_package")
    with pytest.raises(RewardError, match="No module named 'no_such_package'"):
        load_reward("fails_at_first:score", {})
    path.write_text("def score(images, prompts):\n    return [7.0] * len(prompts)\n")
    assert load_reward("fails_at_first:score", {})(IMAGES, PROMPTS)
    del sys.modules["fails_at_first"]

"""`save_function`: a notebook's function as a module that other processes import."""

import hashlib
import math
import os.path
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from math import sqrt as root
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from cdpo_ray import save_function
from cdpo_ray.errors import RewardError, StoreError
from cdpo_ray.user_code import load_function, source_files

WEIGHT = 2


def brightness(images: Tensor, prompts: Sequence[str], scale: float = math.pi) -> np.ndarray:
    """Uses modules, a function under another name, builtins and itself."""
    assert isinstance(brightness, Callable)
    return np.array([root(sum(pixels)) * scale for pixels in images]) + len(os.path.join("a", "b"))


def uses_a_value(images: Tensor, prompts: Sequence[str]) -> list[float]:
    return [WEIGHT * float(image.sum()) for image in images]


def uses_a_helper_within(images: Tensor, prompts: Sequence[str]) -> Any:
    return (lambda: WEIGHT + helper(images))()


def helper(images: Tensor) -> float:
    return 0.0


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory, whose module no other test imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("my_reward", None)


def test_another_process_imports_the_function_and_gets_the_same_values() -> None:
    name = save_function(brightness, "my_reward.py")
    assert name == "my_reward:brightness"
    code = (
        "import sys; sys.path.insert(0, '.'); from my_reward import brightness;"
        " print(brightness([[1, 3], [9]], []).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == f"{brightness([[1, 3], [9]], []).tolist()}\n"
    assert load_function("reward", name, RewardError)([[4]], []) == 2 * math.pi + 3


def test_a_changed_function_replaces_the_file_its_sha256_and_the_loaded_module() -> None:
    def one(images: Any, prompts: Any) -> int:
        return 1

    def two(images: Any, prompts: Any) -> int:
        return 2

    found = []
    for function in (one, two):
        name = save_function(function, "my_reward.py")
        [path] = source_files(name).values()
        found.append(hashlib.sha256(path.read_bytes()).hexdigest())
        if function is one:
            assert load_function("reward", name, RewardError)([], []) == 1
    assert found[0] != found[1]
    assert "return 2" in Path("my_reward.py").read_text()
    assert load_function("reward", "my_reward:two", RewardError)([], []) == 2


def test_a_file_that_was_changed_by_hand_is_executed_again_and_another_is_not() -> None:
    Path("my_reward.py").write_text("numbers = [1]")
    loaded = [load_function("reward", "my_reward:numbers", RewardError) for _ in range(2)]
    assert loaded[0] is loaded[1]
    Path("my_reward.py").write_text("numbers = [2]")
    assert load_function("reward", "my_reward:numbers", RewardError) == [2]


def test_a_value_that_other_processes_lack_is_named() -> None:
    with pytest.raises(ValueError, match=r"`function` uses_a_value: uses 'WEIGHT' of its surroundings"):
        save_function(uses_a_value, "my_reward.py")
    local = 3

    def nested(images: Any, prompts: Any) -> int:
        return local

    with pytest.raises(ValueError, match=r"uses 'local' of its surroundings"):
        save_function(nested, "my_reward.py")
    assert not Path("my_reward.py").exists()


def test_functions_of_importable_modules_are_imported_and_those_of_the_notebook_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"uses 'WEIGHT' of its surroundings"):
        save_function(uses_a_helper_within, "my_reward.py")
    monkeypatch.setattr(helper, "__module__", "__main__")
    with pytest.raises(ValueError, match=r"uses 'WEIGHT', 'helper' of its surroundings"):
        save_function(uses_a_helper_within, "my_reward.py")


@pytest.mark.parametrize("function", [lambda images, prompts: 0, Path, len, "redness", brightness.__call__])
def test_only_functions_defined_by_def_are_written(function: Any) -> None:
    with pytest.raises(ValueError, match=r"`function` must be a function defined by `def`, got "):
        save_function(function, "my_reward.py")


@pytest.mark.parametrize("file", ["my_reward", "folder/my_reward.py", "../my_reward.py", "my-reward.py", "1.py"])
def test_a_file_that_no_configuration_can_name_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match=r"`file` must be a Python file in the working directory"):
        save_function(brightness, file)


@pytest.mark.parametrize("file", ["numpy.py", "json.py", "sys.py"])
def test_a_file_that_would_hide_a_module_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match=r"has the name of an installed module; choose another"):
        save_function(brightness, file)


def test_a_file_of_the_user_is_never_replaced() -> None:
    Path("my_reward.py").write_text("score = 1")
    with pytest.raises(StoreError, match=r"my_reward.py: exists, and was not written by `save_function`"):
        save_function(brightness, "my_reward.py")
    assert Path("my_reward.py").read_text() == "score = 1"

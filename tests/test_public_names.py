"""The names that `cdpo_ray` exports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cdpo_ray


def test_the_import_is_cheap_and_opening_a_run_needs_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'pandas', 'pyarrow', 'pydantic'} & {*sys.modules}"
    code = (
        f"import sys, cdpo_ray; first = {heavy}; names = [getattr(cdpo_ray, name) for name in cdpo_ray.__all__];"
        f" print(sorted(first), sorted({heavy}))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[] ['pandas', 'pyarrow', 'pydantic']\n"


def test_type_checkers_see_the_names_that_exist_at_run_time() -> None:
    tree = ast.parse(Path(cdpo_ray.__file__).read_text())
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert sorted(seen) == cdpo_ray.__all__
    for name, module in seen.items():
        assert getattr(cdpo_ray, name) is getattr(sys.modules[module], name)
        assert getattr(cdpo_ray, name).__doc__
        assert name in dir(cdpo_ray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'cdpo_ray' has no attribute 'open_runs'"):
        _ = cdpo_ray.open_runs

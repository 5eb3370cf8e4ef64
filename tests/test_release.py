"""What a release states in more than one file agrees."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from cdpo_ray import __version__

ROOT = Path(__file__).parents[1]


def test_the_changelog_has_unreleased_on_top_and_then_the_version_of_the_package() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", __version__]


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert str(citation["version"]) == __version__
    assert citation["preferred-citation"]["url"] == "https://arxiv.org/abs/2405.13637"


def test_hooks_run_what_make_lint_runs() -> None:
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in local["hooks"]}
    recipe = (ROOT / "Makefile").read_text("utf-8").split("\nlint:")[1].split("\n\n")[0]
    checks = {line.removesuffix(" .").removesuffix(" --check") for line in re.findall(r"\$\(BIN\)/(.+)", recipe)}
    assert local["repo"] == "local"
    assert hooks == checks

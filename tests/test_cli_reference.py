"""The page of the command line is what the parser prints, in any terminal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cdpo_ray.cli import VERBS, main
from cdpo_ray.cli.reference import ENVIRONMENT, reference_page

ROOT = Path(__file__).parents[1]


def test_the_page_is_up_to_date() -> None:
    """After a change: ``python -m cdpo_ray.cli.reference > docs/reference/cli.md``."""
    assert (ROOT / "docs" / "reference" / "cli.md").read_text() == reference_page()


def test_the_page_is_written_by_its_module() -> None:
    command = [sys.executable, "-m", "cdpo_ray.cli.reference"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert (found.stdout, found.stderr) == (reference_page(), "")


def test_each_verb_has_a_heading_and_the_help_that_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = reference_page()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    for verb in VERBS:
        with pytest.raises(SystemExit, match=r"^0$"):
            main([verb, "--help"])
        assert f"\n## cdpo {verb}\n\n```text\n{capsys.readouterr().out}```\n" in page


def test_width_and_colours_of_the_terminal_change_nothing_and_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = reference_page()
    terminal = {"COLUMNS": "200", "FORCE_COLOR": "1", "PYTHON_COLORS": "1"}
    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert reference_page() == plain and "\x1b" not in plain

    assert {name: os.environ.get(name) for name in ENVIRONMENT} == {**terminal, "NO_COLOR": None}

"""What the README shows: the quickstart's gain on held-out prompts, and that random labels bring none."""

import json
from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.config import load_config
from cdpo_ray.run import run_steps, write_reports
from cdpo_ray.steps import STEPS
from cdpo_ray.store import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.usefixtures("local_ray")]

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def walk(folder: Path, name: str, *overrides: str) -> tuple[RunFolder, dict[str, Any]]:
    config = load_config(QUICKSTART, [f"run.dir={folder}", f"run.name={name}", *overrides])
    run = run_steps(config, STEPS)
    write_reports(config)
    return run, json.loads((run.step("5-evaluation") / "metrics.json").read_text())["judges"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    return walk(tmp_path_factory.mktemp("runs"), "quickstart")


def test_quickstart_gains_on_heldout_prompts(quickstart: tuple[RunFolder, dict[str, Any]]) -> None:
    _, judged = quickstart
    attributes, clip = judged["oracle"]["difference"], judged["clip"]["difference"]
    assert attributes["mean"] >= 0.08
    assert attributes["low"] > 0
    assert clip["mean"] >= 0.015
    assert clip["low"] > 0
    assert 0.3 < judged["oracle"]["base"]["mean"] < 0.9


@pytest.mark.nightly
def test_random_labels_bring_no_gain(quickstart: tuple[RunFolder, dict[str, Any]]) -> None:
    run, _ = quickstart
    control = run.path.parent / "control"
    control.mkdir()
    for folder in ("1-samples", "2-scores"):
        (control / folder).symlink_to(run.step(folder))
    _, judged = walk(run.path.parent, "control", "curriculum.label_noise=0.5")
    attributes = judged["oracle"]["difference"]
    assert attributes["low"] <= 0
    assert attributes["mean"] < 0.04

"""`run_pipeline`, as far as it needs no Ray; `tests/test_notebooks.py` runs the rest."""

import logging
from pathlib import Path

import pytest
from finished_runs import config_of, judged, write_run

from cdpo_ray import run_pipeline
from cdpo_ray.errors import ConfigError, StoreError


def test_finished_steps_are_skipped_and_the_run_is_opened(
    tmp_path: Path, embedded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, "embedded")
    write_run(
        config,
        lambda number, folder: (folder / "updates.jsonl").touch(),
        lambda number: {"judges": {"clip": judged(0.4, 0.5)}, "num_prompts": 4, "images_per_prompt": 2},
    )
    with caplog.at_level(logging.INFO, "cdpo_ray"):
        run = run_pipeline(config.plain(), steps=["evaluate", "score"])
    assert [record.getMessage() for record in caplog.records] == ["score: done already", "evaluate: done already"]
    assert run.path == tmp_path / "tuned"
    assert run.metrics["judges"]["clip"]["tuned"]["mean"] == 0.5
    with pytest.raises(StoreError, match=r"is missing, but the report needs it"):
        run_pipeline(config)  # with the report, which these stand-ins lack


def test_an_unknown_step_is_refused_with_the_names_of_all(tmp_path: Path) -> None:
    config = config_of(tmp_path, "embedded")
    with pytest.raises(
        ConfigError, match=r"`steps` must be names of 'generate', 'score', 'pairs', 'train', 'evaluate', got 'rank'"
    ):
        run_pipeline(config, steps=["score", "rank"])
    assert not (tmp_path / "tuned").exists()

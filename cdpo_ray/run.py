"""The whole way, step after step; a finished step is skipped."""

import json
import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import yaml

from cdpo_ray.config import Config
from cdpo_ray.prompts.sources import PromptSplit, split_prompts
from cdpo_ray.records import STAGES
from cdpo_ray.session import ray_session
from cdpo_ray.steps import STEPS, Context, Step
from cdpo_ray.store import RunFolder

log = logging.getLogger(__name__)
REPORT = "report.html"


def read_prompts(config: Config) -> PromptSplit:
    """The prompts that a configuration names."""
    train, heldout = config.prompts.train, config.prompts.heldout
    assert train.source is not None, "checked by the config"
    return split_prompts(
        train_source=train.source,
        train_count=train.count,
        heldout_source=heldout.source,
        heldout_count=heldout.count,
        heldout_fraction=heldout.fraction,
        seed=config.run.seed,
    )


def run_steps(config: Config, steps: Iterable[Step], *, verbose: bool = False) -> RunFolder:
    """Do what of these steps is not done yet; Ray starts when the first of them needs it.

    Raises:
        CdpoError: of any kind; what was finished before it stays.
    """
    context = Context(config, read_prompts(config), RunFolder(Path(config.run.dir) / config.run.name))
    with ExitStack() as stack:
        stack.enter_context(context.run.locked())
        ray_started = False
        for step in steps:
            settings = step.settings(config)
            inputs = {folder: context.run.fingerprint(folder) for folder in step.inputs}
            if context.run.is_complete(step.folder, settings, inputs):
                log.info("%s: done already", step.verb)
                continue
            if not ray_started:
                stack.enter_context(ray_session(verbose=verbose))
                ray_started = True
            log.info("%s ...", step.verb)
            started = time.monotonic()
            with context.run.writing(step.folder, settings, inputs, seed=config.run.seed, resumable=step.resumable) as (
                output_dir,
                output,
            ):
                step.perform(context, output_dir, output)
            counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in output.counts.items() if count)
            log.info("%s: %s in %.1f s", step.verb, counts, time.monotonic() - started)
            for warning in output.warnings:
                log.warning("%s: %s", step.verb, warning)
        (context.run.path / "config.yaml").write_text(
            yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True)
        )
    return context.run


def explain_stages(config: Config) -> str:
    """What each stage holds, as a table; draws it to `stages.png` of the run, whose path is the last line."""
    from cdpo_ray.curriculum.explanation import draw_stages, stages_table

    run = RunFolder(Path(config.run.dir) / config.run.name)
    stages = json.loads((run.step(STAGES) / "stages.json").read_text())
    path = run.path / "stages.png"
    table, title = stages_table(stages), f"{config.run.name}\n{config.curriculum.sentence}"
    if config.curriculum.measure == "margin":
        table += "\nas before the first update; training measures the margins anew at each stage's start"
    draw_stages(stages, path, title=title)
    return f"{table}\n{path}"


def write_report(config: Config, *, anew: bool = False) -> Path:
    """Write `report.html` of a run whose steps are done, unless it is younger than they are; returns its path."""
    run = RunFolder(Path(config.run.dir) / config.run.name)
    path = run.path / REPORT
    finished = [run.step(step.folder) / "manifest.json" for step in STEPS]
    if not anew and path.is_file() and path.stat().st_mtime > max(manifest.stat().st_mtime for manifest in finished):
        log.info("report: done already")
        return path
    from cdpo_ray.evaluation.report import write_report as write

    write(run.path, path)
    log.info("report: %s", path)
    return path

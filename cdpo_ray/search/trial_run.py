"""One trial in its own process: training, and a report of each stage."""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cdpo_ray.config import Config
from cdpo_ray.errors import LockHeldError
from cdpo_ray.evaluation.metrics import preference_accuracy
from cdpo_ray.evaluation.report import TRAINED_STAGES, read_record
from cdpo_ray.evaluation.statistics import Scores, compare_scores
from cdpo_ray.records import TRAINING, score_column
from cdpo_ray.run import run_steps
from cdpo_ray.search.space import config_of
from cdpo_ray.search.trials import Report, read_trial
from cdpo_ray.steps import STEPS
from cdpo_ray.store import RunFolder, read_shards, storage_path
from cdpo_ray.store.lock import RENEW_SECONDS, STALE_SECONDS
from cdpo_ray.training.job import ValidationJob

log = logging.getLogger(__name__)
TRIAL_STEPS = STEPS[:4]
"""Steps up to training; the first two link the output of the search's run."""


def once_unlocked(run: Callable[[], Any]) -> None:
    """Run the steps of a trial, as soon as the lock of its dead predecessor has expired.

    Tune starts a trial again only after its process has ended, perhaps on a node that is gone, so the lock in an object
    store belongs to nobody.

    Raises:
        LockHeldError: another process keeps renewing the lock.
    """
    deadline, is_waiting = time.monotonic() + STALE_SECONDS + RENEW_SECONDS, False
    while True:
        try:
            run()
        except LockHeldError as error:
            if time.monotonic() > deadline:
                raise
            if not is_waiting:
                log.warning("waiting for the lock of the process that this one replaces: %s", error)
            is_waiting = True
            time.sleep(RENEW_SECONDS / 3)
        else:
            return


def train_trial(
    name: str,
    report: Callable[[Report], None],
    *,
    trials_dir: str,
    config: Config,
    validation: ValidationJob,
    judge: str,
) -> None:
    """Train a trial from its last checkpoint, and report the stages that were not reported before.

    Args:
        name: name of the trial in ``trials_dir``.
        report: called after each measured stage; for the last one, after the training folder is complete.
        config: configuration of the search, with paths that are valid on every node.
        validation: samples, judges and sampling of the measurements.
        judge: judge of `reward` and `win_rate`.

    Raises:
        CdpoError: any error of a step; earlier checkpoints are kept.
    """
    trial = read_trial(storage_path(trials_dir) / name)
    own = config_of(config, trial.point, name=name, run_dir=trials_dir, seed=trial.seed)
    base = base_scores(storage_path(validation.samples_dir), validation.judges)
    reported = trial.last_stage

    def report_new(summary: Mapping[str, Any], *, is_last: bool) -> None:
        nonlocal reported
        if summary["stage"] > reported and summary["validation"]:
            reported = summary["stage"]
            report(
                stage_report(
                    summary,
                    base,
                    judge,
                    is_last=is_last,
                    num_resamples=config.evaluation.num_bootstrap_resamples,
                    seed=config.run.seed,
                )
            )

    def on_stage(summary: Mapping[str, Any]) -> None:
        if summary["stage"] < own.curriculum.num_stages and "is_stopped" not in summary:
            report_new(summary, is_last=False)

    once_unlocked(lambda: run_steps(own, TRIAL_STEPS, validation=validation, on_stage=on_stage))
    path = RunFolder(storage_path(trials_dir) / name).step(TRAINING) / "stages.json"
    summaries = read_record(path, TRAINED_STAGES)
    for summary in summaries:
        report_new(summary, is_last=summary is summaries[-1])


def base_scores(samples_dir: Path, judges: Mapping[str, Any]) -> dict[str, Scores]:
    """``[prompt, image]`` scores of the base model's images, by judge."""
    table = read_shards(samples_dir, [score_column(judge) for judge in judges])
    return {judge: np.array(table[score_column(judge)].to_pylist(), dtype=float) for judge in judges}


def stage_report(
    summary: Mapping[str, Any],
    base: Mapping[str, Scores],
    judge: str,
    *,
    is_last: bool,
    num_resamples: int,
    seed: int,
) -> Report:
    """Comparison of the policy after a stage with the base model, on images from the same noise.

    Args:
        summary: summary of the stage, with the output of `Validator.measure` as ``validation``.
        base: `base_scores` of all prompts.
        judge: judge of ``reward`` and ``win_rate``.
        is_last: whether the stage is the trial's last.
        num_resamples, seed: number of draws and seed of the bootstrap over prompts.

    Returns:
        ``stage``, ``is_last``, ``num_prompts``, and to be maximised: ``reward`` (mean difference to the base model, in
        the unit of the judge), ``win_rate`` against it, ``diversity`` (`pairwise_rms_distance`, mean over prompts) and
        ``implicit_accuracy`` (share of pairs of the base's images that the implicit reward orders as the judge does;
        `None` if it was not measured, or all scores of each prompt are equal). ``judges``: a `Comparison` per judge;
        ``by_prompt``: by judge, the difference to the base model of each prompt, `None` without a finite score;
        ``training``: the rest of the summary.
    """
    rest = dict(summary)
    found = rest.pop("validation")
    num_prompts = len(found["diversity"])
    tuned = {name: np.array(values, dtype=float) for name, values in found["scores"].items()}
    base = {name: base[name][:num_prompts] for name in tuned}
    bootstrap: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed}
    compared = {name: compare_scores(base[name], tuned[name], **bootstrap) for name in tuned}
    accuracy = None
    if "implicit_values" in found:
        accuracy = preference_accuracy(np.array(found["implicit_values"]), base[judge], **bootstrap)
    return {
        "stage": summary["stage"],
        "is_last": is_last,
        "num_prompts": num_prompts,
        "reward": compared[judge].difference.mean,
        "win_rate": compared[judge].win_rate.mean,
        "diversity": float(np.mean(found["diversity"])),
        "implicit_accuracy": accuracy and accuracy["mean"],
        "judges": {name: comparison.to_dict() for name, comparison in compared.items()},
        "by_prompt": {name: _means_of_finite(tuned[name] - base[name]) for name in tuned},
        "training": rest,
    }


def _means_of_finite(values: Scores) -> list[float | None]:
    """Mean of the finite values of each row; `None` without any."""
    return [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else None for row in values]

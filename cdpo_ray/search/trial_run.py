"""One trial in its own process: a run that trains, and what it reports of each stage."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cdpo_ray.config import Config
from cdpo_ray.evaluation.metrics import preference_accuracy
from cdpo_ray.evaluation.report import TRAINED_STAGES, read_record
from cdpo_ray.evaluation.statistics import Scores, compare
from cdpo_ray.records import TRAINING, score_column
from cdpo_ray.run import run_steps
from cdpo_ray.search.space import config_of
from cdpo_ray.search.trials import Report, read_trial
from cdpo_ray.steps import STEPS
from cdpo_ray.store import RunFolder, read_shards, storage_path
from cdpo_ray.training.job import ValidationJob

TRIAL_STEPS = STEPS[:4]
"""Up to training; the first two take what the search's run has."""


def train_trial(
    name: str,
    report: Callable[[Report], None],
    *,
    trials_dir: str,
    config: Config,
    validation: ValidationJob,
    judge: str,
) -> None:
    """Train a trial from where it stands, and report the stages that were not reported before.

    Args:
        name: of the trial in ``trials_dir``.
        report: called after each stage that is measured; after the last one once all is in place.
        config: of the search, with paths that hold on every node.
        judge: whose scores are `reward` and `win_rate`.

    Raises:
        CdpoError: of any kind; what was committed before it stays.
    """
    trial = read_trial(storage_path(trials_dir) / name)
    own = config_of(config, trial.point, name=name, run_dir=trials_dir, seed=trial.seed)
    base = base_scores(storage_path(validation.samples_dir), validation.judges)
    reported = trial.last_stage

    def tell(summary: Mapping[str, Any], *, is_last: bool) -> None:
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
        if summary["stage"] < own.curriculum.num_stages:
            tell(summary, is_last=False)

    run_steps(own, TRIAL_STEPS, validation=validation, on_stage=on_stage)
    path = RunFolder(storage_path(trials_dir) / name).step(TRAINING) / "stages.json"
    summaries = read_record(path, TRAINED_STAGES)
    for summary in summaries:
        tell(summary, is_last=summary is summaries[-1])


def base_scores(samples_dir: Path, judges: Mapping[str, Any]) -> dict[str, Scores]:
    """``[prompt, image]`` by judge, of the base model's images."""
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
    """How the policy of a stage's end compares with the base model on the images of the same noise.

    Args:
        summary: of the stage, with what `Validator.measure` found as ``validation``.
        base: `base_scores` of all prompts.
        judge: whose scores are ``reward`` and ``win_rate``.
        num_resamples, seed: of the bootstrap over prompts.

    Returns:
        ``stage``, ``is_last``, ``num_prompts``, and to be maximised: ``reward`` (mean difference to the base model, in
        the unit of the judge), ``win_rate`` against it, ``diversity`` (`pairwise_rms_distance`, mean over prompts) and
        ``implicit_accuracy`` (share of pairs of the base's images that the implicit reward orders as the judge does;
        none if it was left out, or the judge finds all alike). ``judges``: a `Comparison` each; ``by_prompt``: each
        one's difference to the base model, none where no image has a score; ``training``: the rest of the summary.
    """
    rest = dict(summary)
    found = rest.pop("validation")
    num_prompts = len(found["diversity"])
    tuned = {name: np.array(values, dtype=float) for name, values in found["scores"].items()}
    few = {name: base[name][:num_prompts] for name in tuned}
    bootstrap = {"num_resamples": num_resamples, "seed": seed}
    compared = {name: compare(few[name], tuned[name], **bootstrap) for name in tuned}
    accuracy = None
    if "implicit_values" in found:
        accuracy = preference_accuracy(np.array(found["implicit_values"]), few[judge], **bootstrap)
    return {
        "stage": summary["stage"],
        "is_last": is_last,
        "num_prompts": num_prompts,
        "reward": compared[judge].difference.mean,
        "win_rate": compared[judge].win_rate.mean,
        "diversity": float(np.mean(found["diversity"])),
        "implicit_accuracy": accuracy and accuracy["mean"],
        "judges": {name: comparison.to_dict() for name, comparison in compared.items()},
        "by_prompt": {name: _means_of_finite(tuned[name] - few[name]) for name in tuned},
        "training": rest,
    }


def _means_of_finite(values: Scores) -> list[float | None]:
    """Of each row."""
    return [float(row[np.isfinite(row)].mean()) if np.isfinite(row).any() else None for row in values]

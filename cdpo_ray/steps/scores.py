"""Config -> arguments of scoring, without the scores that exist here or in another run."""

import logging
from pathlib import Path
from typing import Any

from cdpo_ray.config import JUDGE_NO_IMAGE, Config
from cdpo_ray.prompts.sources import held_out
from cdpo_ray.records import LABEL, PREFERENCE, SAMPLES, SCORES, score_column, score_file
from cdpo_ray.steps.arguments import judged_with, model_arguments
from cdpo_ray.steps.step import Context
from cdpo_ray.store import (
    RunFolder,
    StepOutput,
    exists,
    link,
    make_folder,
    path_within,
    read_shards,
    shard_schema,
    storage_path,
)

log = logging.getLogger(__name__)


def score(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.rewards.score_table import write_scores

    config, samples_dir = context.config, context.run.step(SAMPLES)
    rewards, settings, parts = config.rewards, score_settings(config), _score_parts(config)
    with_images = context.run.manifest(SAMPLES)["details"].get("rewards", {})
    other_dir, there = _scores_elsewhere(context)
    num_samples = config.generation.images_per_prompt
    if config.preferences:
        num_samples = shard_schema(samples_dir).field("latents").type.shape[0]
    missing: dict[bool, list[str]] = {False: [], True: []}
    for part in output.parts:
        reward, second = parts[part]
        path = output_dir / score_file(reward, second=second)
        if there.get(part) == settings[part]:
            make_folder(path.parent)
            link(path_within(other_dir, score_file(reward, second=second)).resolve(), path)
        elif with_images.get(reward) == judged_with(config, reward) and (reward in JUDGE_NO_IMAGE or not second):
            rows = read_shards(samples_dir, ["prompt_index", "prompt_id", "prompt", score_column(reward)])
            rows = rows.sort_by("prompt_index")
            if reward == LABEL:
                unseen = held_out(rows["prompt"].to_pylist(), config.prompts.heldout.fraction)
                rows = rows.filter([not held for held in unseen])
            write_scores(rows[: rewards.noise_prompts] if second else rows, reward, path)
        else:
            missing[second].append(reward)
    output.counts |= {"scores": 0, "scores_computed_now": 0}
    for second, names in missing.items():
        if names:
            from cdpo_ray.rewards.pool import rescore

            scored = rescore(
                samples_dir,
                rewards={name: rewards.options(name, again=second) for name in names},
                scorers=config.resources.scorers,
                images_per_batch=config.generation.images_per_batch,
                images_per_prompt=num_samples,
                keep_images=config.generation.keep_images,
                family=config.model.family,
                model=model_arguments(config),
                num_prompts=rewards.noise_prompts if second else None,
                mixed=second,
                progress=context.progress,
            )
            for name in names:
                write_scores(scored, name, output_dir / score_file(name, second=second))
            num_images = scored.num_rows * num_samples
            output.counts["scores_computed_now"] += num_images * len(names)
    for part in output.parts:
        if parts[part][0] not in (PREFERENCE, LABEL):  # missing labels are no fault of a judge
            _describe_scores(*parts[part], context, output_dir, output)


def score_settings(config: Config) -> dict[str, Any]:
    """Settings of each file of the step, by part: a reward's scores, and its second scores."""
    rewards = config.rewards
    settings = {
        part: rewards.noise_prompts if second else judged_with(config, reward)
        for part, (reward, second) in _score_parts(config).items()
    }
    if config.preferences:
        settings[LABEL] = {"prompts.heldout.fraction": config.prompts.heldout.fraction}
    return settings


def _score_parts(config: Config) -> dict[str, tuple[str, bool]]:
    """Part of the settings -> reward, and whether the part is its second scores."""
    rewards = config.rewards
    parts = {f"rewards.{name}": (name, False) for name in rewards.names}
    if config.preferences:
        parts[LABEL] = (LABEL, False)
    return parts | {f"rewards.noise_prompts.{name}": (name, True) for name in rewards.names if rewards.noise_prompts}


def _scores_elsewhere(context: Context) -> tuple[Path, dict[str, Any]]:
    """Scores folder of the run that the samples are taken from, and the settings of its files; empty: not usable."""
    config = context.config
    other = RunFolder(storage_path(config.run.samples_from or ""), foreign=True)
    if config.run.samples_from and other.has(SCORES):
        other.refuse_damage(SCORES)
        manifest = other.manifest(SCORES)
        if manifest["inputs"] == {SAMPLES: context.run.fingerprint(SAMPLES)}:
            files = {part: score_file(name, second=second) for part, (name, second) in _score_parts(config).items()}
            listed = {part: made for part, made in manifest["settings"].items() if files.get(part) in manifest["files"]}
            return other.step(SCORES), listed
    return other.path, {}


def _describe_scores(reward: str, second: bool, context: Context, output_dir: Path, output: StepOutput) -> None:
    import numpy as np

    from cdpo_ray.curriculum.noise import score_noise
    from cdpo_ray.rewards.score_table import read_scores

    first_path = output_dir / score_file(reward)
    if not exists(first_path):  # written by an earlier attempt; this is the second scoring
        first_path = context.run.step(SCORES) / score_file(reward)
    _, scores = read_scores(first_path, reward)
    if second:
        _, again = read_scores(output_dir / score_file(reward, second=True), reward)
        noise = score_noise(scores[: len(again)], again)
        output.details[f"noise_{reward}"] = noise if np.isfinite(noise) else None
        log.info("score: `%s` scored %d prompts twice: its noise is %.4g", reward, len(again), noise)
        return
    num_bad = scores.size - int(np.isfinite(scores).sum())
    output.counts["scores"] += scores.size
    output.counts[f"not_finite_{reward}"] = num_bad
    if num_bad:
        output.warnings.append(f"{num_bad} of {scores.size} scores of `{reward}` are not finite and are not used")

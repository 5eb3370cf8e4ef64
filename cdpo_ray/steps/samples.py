"""Config -> arguments of generating samples, importing them, or reusing those of another run."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from cdpo_ray.config import Config
from cdpo_ray.errors import PreferenceError, StoreError, printable
from cdpo_ray.records import LABEL, PREFERENCE, SAMPLES, VALIDATION
from cdpo_ray.steps.arguments import (
    judge_settings,
    judged_with,
    model_arguments,
    model_sha256,
    preference_frame,
    preference_source,
    prompts_sha256,
    sampling_of,
    sections_of,
    seed_setting,
    warn_of_quarantine,
)
from cdpo_ray.steps.step import Context
from cdpo_ray.store import (
    RunFolder,
    StepOutput,
    delete,
    differences,
    link,
    make_folder,
    path_within,
    read_shards,
    read_table,
    refuse_full_disk,
    storage_path,
    table_schema,
)

SAMPLE_COLUMNS = {"prompt_index", "prompt_id", "prompt", "latents"}


def generate(context: Context, output_dir: Path, output: StepOutput) -> None:
    if context.config.run.samples_from:
        _take_samples(
            RunFolder(storage_path(context.config.run.samples_from), foreign=True), context, output_dir, output
        )
        return
    from cdpo_ray.generation.pool import generate_samples
    from cdpo_ray.models.sizes import sizes_of
    from cdpo_ray.rewards.pool import score_pixels
    from cdpo_ray.rewards.scorer import Scorer

    config = context.config
    judges = config.rewards.judges_of_one_image  # the step `score` computes the others
    rewards = {
        name: judged_with(config, name) for name in config.rewards.names if not config.rewards.needs_whole_prompts(name)
    }
    sampling = sampling_of(config, config.generation.images_per_prompt, context.seed)
    sampling = replace(sampling, max_masked_fraction=config.rewards.max_masked_fraction)
    if sizes := sizes_of(config.model.family, config.model.layout.path, sampling.height, sampling.width):
        num_images = len(context.prompts.train) * sampling.images_per_prompt
        refuse_full_disk(output_dir, num_images * sizes.latent_bytes(config.model.dtype))  # sizes of PNGs are unknown
    fused = config.rewards.placement == "fused" or not judges
    made_with = generate_samples(
        context.prompts.train,
        output_dir,
        family=config.model.family,
        model=model_arguments(config, compiles=context.compiles("generate")),
        sampling=sampling,
        tuned_dir=context.start_dir,
        keep_images=config.generation.keep_images,
        generators=config.resources.generators,
        make_scores=functools.partial(Scorer, judges) if fused else None,
        then=None
        if fused
        else functools.partial(
            score_pixels,
            rewards=judges,
            scorers=config.resources.scorers,
            images_per_batch=sampling.images_per_batch,
            rows_per_call=1,
            keep_pixels=config.generation.keep_images,
        ),
        then_in=None if fused else config.resources.scorers,
        max_bad_fraction=config.generation.max_bad_fraction,
        progress=context.progress,
    )
    cut = read_shards(output_dir, ["num_tokens_cut"])["num_tokens_cut"].to_numpy()
    num_images = len(cut) * sampling.images_per_prompt
    output.counts |= {"prompts": len(cut), "images": num_images, "prompts_cut": int((cut > 0).sum())}
    output.counts |= {"lines_doubled": context.prompts.num_doubled, "lines_empty": context.prompts.num_empty}
    in_smaller = {size: num for size, num in made_with.items() if size != sampling.images_per_batch}
    output.counts |= {
        "prompts_set_aside": len(context.prompts.train) - len(cut),
        "prompts_in_smaller_batches": sum(in_smaller.values()),
    }
    output.details["rewards"] = rewards  # settings of the score columns, which the next step compares
    _warn_of_truncated_prompts(output)
    if in_smaller:
        output.warnings.append(
            f"out of memory with `generation.images_per_batch` = {sampling.images_per_batch}:"
            f" {sum(in_smaller.values())} prompts were generated with {', '.join(map(str, sorted(in_smaller)))}"
        )
    warn_of_quarantine(output, output_dir)


def import_preferences(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.preferences.files import scan
    from cdpo_ray.preferences.pool import import_samples
    from cdpo_ray.preferences.rows import Fault
    from cdpo_ray.rewards.scorer import Scorer

    config, source = context.config, preference_source(context.config)
    preferences = config.preferences
    assert preferences is not None, "called for a config with preferences only"
    found = scan(source)
    found.refuse_unusable(source, preferences.max_bad_fraction)
    judges = config.rewards.judges_of_one_image  # the step `score` computes the others
    context.progress.begin("import", total=found.num_rows, unit="row")
    quarantined = import_samples(
        found.chunks,
        output_dir,
        source=source,
        frame=preference_frame(config),
        num_samples=found.num_samples,
        family=config.model.family,
        model=model_arguments(config),
        images_per_batch=config.generation.images_per_batch,
        keep_images=config.generation.keep_images,
        make_scores=functools.partial(Scorer, judges) if judges else None,
        encoders=config.resources.generators,
        progress=context.progress,
    )
    num_faulty = len({(fault["file"], fault["number"]) for fault in quarantined})
    too_many = num_faulty > preferences.max_bad_fraction * found.num_rows
    if too_many or not any(output_dir.glob("*.parquet")):
        raise PreferenceError(
            f"`preferences.path` {source.path}: {num_faulty:,} of {found.num_rows:,} rows, or images of them, cannot be"
            f" used, more than `preferences.max_bad_fraction` = {preferences.max_bad_fraction}; first:"
            f" {Fault(**quarantined[0])}; `cdpo import --check` lists all"
        )
    made = read_shards(output_dir, ["num_tokens_cut", "num_images_cut"])
    output.counts |= {
        "rows": found.num_rows,
        "rows_imported": made.num_rows,
        "rows_tied": found.num_tied,
        "rows_unlabelled": found.num_unlabelled,
        "rows_set_aside": found.num_rows - made.num_rows - found.num_tied - found.num_unlabelled,
        "rows_with_faults": num_faulty,
        "images_cut": int(made["num_images_cut"].to_numpy().sum()),
        "prompts_cut": int((made["num_tokens_cut"].to_numpy() > 0).sum()),
    }
    output.details["rewards"] = {name: judged_with(config, name) for name in (PREFERENCE, LABEL, *judges)}
    if quarantined:
        output.warnings.append(f"{num_faulty:,} rows, or images of them, cannot be used; see set_aside.jsonl")
    output.warnings += found.warnings
    _warn_of_truncated_prompts(output)


def sample_to_compare(context: Context, output_dir: Path, output: StepOutput, *, side: str) -> None:
    """Sample the base model on a split's prompts and score the images by all judges, once for all trials of a search.

    Args:
        side: ``validation`` or ``heldout``.
    """
    import numpy as np

    from cdpo_ray.dataflow.images import decode_pngs, pairwise_rms_distance
    from cdpo_ray.generation.pool import generate_samples
    from cdpo_ray.rewards.scorer import Scorer

    config, prompts = context.config, getattr(context.prompts, side)
    generate_samples(
        prompts,
        output_dir,
        family=config.model.family,
        model=model_arguments(config),
        sampling=sampling_to_compare(config, side),
        tuned_dir=None,
        keep_images=True,
        generators=config.resources.generators,
        make_scores=functools.partial(Scorer, config.evaluation_judges),
        then=None,
        max_bad_fraction=config.generation.max_bad_fraction,
        progress=context.progress,
    )
    diversity = [
        pairwise_rms_distance(decode_pngs(pngs.as_py(), [f"{shard}: image {number}" for number in range(len(pngs))]))
        for shard in sorted(output_dir.glob("*.parquet"))  # one at a time: all PNGs may exceed memory
        for pngs in read_table(shard, ["images"])["images"]
    ]
    output.details["diversity"] = float(np.mean(diversity))
    output.counts |= {"prompts": len(diversity), "prompts_set_aside": len(prompts) - len(diversity)}
    warn_of_quarantine(output, output_dir)


def sampling_to_compare(config: Config, side: str) -> Any:
    """`Sampling` of a split's prompts in a search: base and every policy sample from the same noise."""
    assert config.search is not None, "called for a config with a search only"
    num_images = config.search.images_per_prompt if side == VALIDATION else config.evaluation.images_per_prompt
    return sampling_of(config, num_images, config.run.seed)


def _warn_of_truncated_prompts(output: StepOutput) -> None:
    if num_prompts := output.counts["prompts_cut"]:
        output.warnings.append(f"{num_prompts} prompts exceed the text encoder's token limit and were truncated")


def sample_settings(config: Config) -> dict[str, Any]:
    return (
        sections_of(config, "model")
        | model_sha256(config)
        | {"generation": config.generation.outcome}
        | seed_setting(config)
        | prompts_sha256(config, "train")
        | {
            "prompts.train": config.prompts.train.model_dump() if config.prompts.train else None,
            "prompts.heldout.fraction": config.prompts.heldout.fraction,
            "prompts.validation.fraction": config.prompts.validation.fraction if config.prompts.validation else None,
            "rewards.perturbation.max_masked_fraction": config.rewards.max_masked_fraction,
        }
    )


def settings_to_compare(config: Config, *, side: str) -> dict[str, Any]:
    source = getattr(config.prompts, side)
    return (
        sections_of(config, "model")
        | model_sha256(config)
        | {"generation": config.generation.outcome}
        | seed_setting(config)
        | {f"prompts.{side}": source.model_dump()}
        | prompts_sha256(config, side)
        | {"prompts.train": config.prompts.train and config.prompts.train.model_dump()}
        | {"images_per_prompt": sampling_to_compare(config, side).images_per_prompt}
        | judge_settings(config)
    )


def _take_samples(other: RunFolder, context: Context, output_dir: Path, output: StepOutput) -> None:
    """Link the samples of another run, after checking that this run would generate the same ones.

    Raises:
        StoreError: other settings, a later round, damage, or a missing column.
    """
    manifest, where = other.manifest(SAMPLES), f"`run.samples_from`: {other.path / SAMPLES}"
    if changed := differences(manifest["settings"], sample_settings(context.config)):
        raise StoreError(f"{where} was made with {changed}; restore the value, or leave out `run.samples_from`")
    if manifest["inputs"]:
        raise StoreError(f"{where} is of a later round, not of the base model; name the folder of a first round")
    other.refuse_damage(SAMPLES)
    for left in output_dir.rglob("*.parquet"):  # of an interrupted attempt to generate, with other boundaries of shards
        delete(left)
    for name in manifest["files"]:
        source, target = path_within(other.step(SAMPLES), name).resolve(), path_within(output_dir, name)
        columns = {*table_schema(source).names} if name.endswith(".parquet") else SAMPLE_COLUMNS
        if missing := SAMPLE_COLUMNS - columns:
            raise StoreError(f"{source}: has no column `{min(missing)}`; the folder was altered, do not use it")
        make_folder(target.parent)
        link(source, target)
    output.counts |= manifest["counts"]
    output.warnings += [printable(warning, 1000) for warning in manifest["warnings"]]
    kept = {key: manifest["details"][key] for key in ("rewards", "settings_changed") if key in manifest["details"]}
    output.details |= kept | {"taken_from": str(other.path)}

"""Config -> arguments of evaluation and export."""

import functools
import logging
from pathlib import Path
from typing import Any

from cdpo_ray.records import ARMS, EVALUATION, SAMPLES, STAGES, TRAINING
from cdpo_ray.steps.arguments import model_arguments, sampling_of, warn_of_quarantine
from cdpo_ray.steps.step import Context
from cdpo_ray.store import StepOutput, local_copy

log = logging.getLogger(__name__)
NUM_EXAMPLES = 4  # held-out prompts with images in the card of an export


def evaluate(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.evaluation.labelled import LabelledSamples
    from cdpo_ray.evaluation.pool import evaluate_adapter
    from cdpo_ray.pages.page import NO_INTERVAL, has_interval, reasons_without_interval
    from cdpo_ray.rewards.scorer import Scorer

    config = context.config
    judges = config.evaluation_judges
    labelled = None
    if config.preferences and (fraction := config.prompts.heldout.fraction):
        context.run.refuse_damage(SAMPLES, once=True)
        labelled = LabelledSamples(
            context.run.step(SAMPLES), fraction, tuple(config.rewards.judges), config.generation.images_per_batch
        )
    metrics = evaluate_adapter(
        context.prompts.heldout,
        output_dir,
        categories=context.prompts.categories,
        training_dir=context.run.step(TRAINING).resolve(),
        family=config.model.family,
        model=model_arguments(config, compiles=context.compiles("evaluate")),
        sampling=sampling_of(config, config.evaluation.images_per_prompt, config.run.seed),
        judges=list(judges),
        make_scores=functools.partial(Scorer, judges),
        num_margin_draws=config.evaluation.num_margin_draws,
        generators=config.resources.generators,
        num_resamples=config.evaluation.num_bootstrap_resamples,
        seed=config.run.seed,
        max_bad_fraction=config.generation.max_bad_fraction,
        progress=context.progress,
        labelled=labelled,
    )
    for judge, found in metrics["judges"].items():
        base, tuned, difference = found["base"], found["tuned"], found["difference"]
        ends = NO_INTERVAL
        if has_interval(difference):
            ends = f"[{difference['low']:+.4f}, {difference['high']:+.4f}]"
        log.info(
            "%s: %.4f -> %.4f, difference %+.4f %s, win rate %.2f",
            judge, base["mean"], tuned["mean"], difference["mean"], ends, found["win_rate"]["mean"],
        )  # fmt: skip
    num_prompts = metrics["num_prompts"]
    context.progress.record(
        {
            f"{judge}/{name}": found[name]["mean"]
            for judge, found in metrics["judges"].items()
            for name in ("base", "tuned", "difference", "win_rate")
        },
        update=context.run.manifest(TRAINING)["counts"].get("updates", 0),
    )
    output.counts |= {
        "prompts": num_prompts,
        "images": 2 * num_prompts * config.evaluation.images_per_prompt,
        "prompts_set_aside": len(context.prompts.heldout) - num_prompts,
    }
    warn_of_quarantine(output, output_dir)
    whole = {
        key: value for key, value in metrics.items() if key != "categories"
    }  # a small category does not need a warning
    if reasons := reasons_without_interval(whole):
        output.warnings.append(f"no interval and no verdict: {'; '.join(reasons)}; add held-out prompts")


def export(context: Context, format_name: str, output_dir: Path) -> None:
    from cdpo_ray.export.folder import write_export

    content, card, pictures = _pairs(context) if format_name == "pairs" else _weights(context, format_name)
    write_export(format_name, content, card, output_dir, pictures)


def _pairs(context: Context) -> tuple[Any, str, dict[str, bytes]]:
    """Pairs of a run, and their card; no pictures."""
    from cdpo_ray.export.card import pairs_card
    from cdpo_ray.export.pairs import DrawnPairs

    config, run = context.config, context.run
    num_stages = config.curriculum.num_stages
    card = pairs_card(
        config.run.name, config.plain(), num_stages, config.rewards.ranking_sentence, config.curriculum.sentence
    )
    return DrawnPairs(run.step(SAMPLES), run.step(STAGES), num_stages), card, {}


def _weights(context: Context, format_name: str) -> tuple[Any, str, dict[str, bytes]]:
    """Trained weights of a run, their model card, and its pictures."""
    from cdpo_ray.evaluation.report import read_metrics
    from cdpo_ray.export.card import RunFacts, model_card, picture_file
    from cdpo_ray.export.trained import Trained
    from cdpo_ray.models.sizes import sizes_of

    config, run = context.config, context.run
    name = config.run.name
    training, generation, model = run.manifest(TRAINING), config.generation, config.model
    sizes = sizes_of(model.family, model.layout.path, generation.height, generation.width)
    trained = Trained(
        name,
        local_copy(run.step(TRAINING)),
        model.family,
        model_arguments(config),
        created=training["created"],
        image_size=(sizes.width, sizes.height) if sizes else None,
    )
    examples = _examples(run.step(EVALUATION) / "comparison.parquet") if run.has(EVALUATION) else []
    facts = RunFacts(
        name=name,
        settings=config.plain(),
        round=context.round,
        num_prompts=len(context.prompts.train),
        num_heldout=len(context.prompts.heldout),
        ranking=config.rewards.ranking_sentence,
        curriculum=config.curriculum.sentence,
        training=training,
        metrics=read_metrics(run.path) if run.has(EVALUATION) else None,
        examples=[row["prompt"] for row in examples],
    )
    pictures = {picture_file(number, arm): row[f"{arm}_image"] for number, row in enumerate(examples) for arm in ARMS}
    return trained, model_card(facts, format_name, trained.denoiser_name), pictures


def _examples(comparison_path: Path) -> list[dict[str, Any]]:
    """Rows of the first image of some held-out prompts.

    Raises:
        StoreError: an image is not a PNG of a limited size.
    """
    from cdpo_ray.dataflow.images import refuse_other_images
    from cdpo_ray.evaluation.report import first_rows, place_of

    rows = [row for row in first_rows(comparison_path, [], NUM_EXAMPLES) if row["sample_index"] == 0]
    for row in rows:
        for arm in ARMS:
            refuse_other_images(row[f"{arm}_image"], place_of(comparison_path, row))
    return rows

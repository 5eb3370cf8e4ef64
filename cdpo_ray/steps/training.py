"""Config -> arguments of drawing pairs and of training."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cdpo_ray.cost.estimate import training_peak
from cdpo_ray.records import PREVIEWS, SAMPLES, SCORES, STAGES, preview_file
from cdpo_ray.steps.arguments import model_arguments, pairs_per_stage, ranking_rule, sampling_of, schedule
from cdpo_ray.steps.step import Context
from cdpo_ray.store import StepOutput, exists, files_within, read_bytes


def pairs(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.curriculum.dataset import read_ranking_scores, write_stages

    config = context.config
    counts, warnings = write_stages(
        read_ranking_scores(context.run.step(SCORES), ranking_rule(config)),
        output_dir,
        schedule=schedule(config),
        pairs_per_stage=pairs_per_stage(config),
        max_bad_fraction=config.rewards.max_bad_fraction,
        seed=context.training_seed,
    )
    output.counts |= counts
    output.warnings += warnings
    if output.counts["prompts_without_pairs"]:
        output.warnings.append(
            f"{output.counts['prompts_without_pairs']} prompts form no pair: their scores are equal, or their gaps do"
            " not exceed `curriculum.min_score_gap` or `curriculum.min_gap_in_noise`"
        )


def train(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.curriculum.reliability import low_reliability
    from cdpo_ray.training.health import Alarm, alarm_sentence, highest_error_rise
    from cdpo_ray.training.job import OnlineJob, PreviewJob, TrainingJob
    from cdpo_ray.training.trainer import train_adapter

    config, training, trainers = context.config, context.config.training, context.config.resources.trainers
    peak = None
    if training.gradient_checkpointing == "auto" and trainers.gpus_per_worker and context.workload:
        validates = context.validation is not None
        peak = training_peak(context.workload, checkpointing=False, validates=validates).total
    online = None
    if num_draws := config.curriculum.num_margin_draws:
        scores_dir = str(context.run.step(SCORES).resolve())
        online = OnlineJob(scores_dir, ranking_rule(config), schedule(config), pairs_per_stage(config), num_draws)
    previews = None
    # Trials of a search have their own measurements and would repeat the base model's images.
    if prompts := [] if context.validation else context.prompts.heldout[: training.preview_prompts]:
        of_worker = math.ceil(len(prompts) / training.num_workers)
        # ZeRO 3 needs the same launches on every worker: no batch may be halved on one of them, out of memory.
        at_once = 1 if training.zero_stage == 3 else min(config.generation.images_per_batch, of_worker)
        sampling = replace(sampling_of(config, 1, config.run.seed), images_per_batch=at_once)
        previews = PreviewJob(prompts, asdict(sampling))
    job = TrainingJob(
        training,
        samples_dir=str(context.run.step(SAMPLES).resolve()),
        stages_dir=str(context.run.step(STAGES).resolve()),
        output_dir=str(output_dir),
        num_stages=config.curriculum.num_stages,
        family=config.model.family,
        model=model_arguments(config, compiles=context.compiles("train")),
        seed=context.training_seed,
        start_dir=context.start_dir,
        online=online,
        validation=context.validation,
        previews=previews,
        plain_peak_bytes=peak,
        gpu_share=min(1.0, trainers.gpus_per_worker),
    )
    num_updates = config.curriculum.num_stages * config.curriculum.updates_per_stage

    def record_previews(stage: int, update: int) -> None:
        paths = {prompt: output_dir / preview_file(stage, prompt) for prompt in previews.prompts} if previews else {}
        if found := {prompt: read_bytes(path) for prompt, path in paths.items() if exists(path)}:
            context.progress.record_images(found, update=update)

    def on_stage(summary: dict[str, Any]) -> None:
        if online:
            reliability = summary["pairs"]["margin_reliability"]
            if warning := low_reliability(summary["stage"], reliability, online.num_draws):
                output.warnings.append(warning)
        record_previews(0, 0)
        record_previews(summary["stage"], summary.get("last_update", 0))
        context.on_stage(summary)

    state = train_adapter(
        job,
        num_updates=num_updates,
        cpus_per_worker=trainers.cpus_per_worker,
        gpus_per_worker=trainers.gpus_per_worker,
        node_labels=trainers.node_labels,
        progress=context.progress,
        on_stage=on_stage,
    )
    skipped, num_made, health = len(state["skipped"]), state["num_updates"], training.health
    output.counts |= {
        "updates": num_made - skipped,
        "pairs": (num_made - skipped) * training.global_batch_size,
        "updates_skipped": skipped,
        "preview_images": sum(name.endswith(".png") for name in files_within(output_dir / PREVIEWS)),
    }
    output.details["training"] = training.model_dump(mode="json", include=set(training.HOW_NOT_WHAT))
    if config.guidance_mismatch:
        output.warnings.append(config.guidance_mismatch)
    output.details["health"] = {
        "max_error_rise": health.max_error_rise,
        "window": health.window,
        "highest_error_rise": highest_error_rise(state["records"], num_updates=num_made, window=health.window),
    }
    if alarms := [Alarm(**alarm) for alarm in state["alarms"]]:
        sentence = alarm_sentence(alarms, health)
        if state["is_stopped"]:
            kept = health.check_before(num_made)
            sentence += (
                f". Training stopped after update {num_made} of {num_updates}; the result is the LoRA after {kept}"
            )
        output.details["health"]["alarm"] = sentence
        output.warnings.append(sentence)
    if skipped:
        output.warnings.append(
            f"{skipped} of {num_made} updates were skipped, because a loss or gradient was not finite:"
            f" {', '.join(map(str, state['skipped'][:10]))}{', ...' * (skipped > 10)}"
        )

"""Config -> the arguments of drawing pairs and of training."""

from pathlib import Path

from cdpo_ray.config import HOW_NOT_WHAT
from cdpo_ray.cost.estimate import training_peak
from cdpo_ray.records import COMMITS_DIR, SAMPLES, SCORES, STAGES
from cdpo_ray.steps.arguments import model_arguments, pairs_per_stage, ranking_rule, schedule
from cdpo_ray.steps.step import Context
from cdpo_ray.store import StepOutput


def pairs(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.curriculum.dataset import read_ranking_scores, write_stages

    config = context.config
    output.counts |= write_stages(
        read_ranking_scores(context.run.step(SCORES), ranking_rule(config)),
        output_dir,
        schedule=schedule(config),
        pairs_per_stage=pairs_per_stage(config),
        max_bad_fraction=config.rewards.max_bad_fraction,
        seed=context.training_seed,
    )
    if output.counts["prompts_without_pairs"]:
        output.warnings.append(
            f"{output.counts['prompts_without_pairs']} prompts form no pair: their scores are equal, or differ by no"
            " more than `curriculum.min_score_gap` or `curriculum.min_gap_in_noise` allows"
        )


def train(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.curriculum.capacity import stage_capacities
    from cdpo_ray.policy.job import LoraJob
    from cdpo_ray.training.job import CommitJob, LossJob, OnlineJob, Optimization, TrainingJob
    from cdpo_ray.training.trainer import train_adapter

    config, training = context.config, context.config.training
    gpus = config.resources.trainers.gpus_per_worker
    job = TrainingJob(
        samples_dir=str(context.run.step(SAMPLES).resolve()),
        stages_dir=str(context.run.step(STAGES).resolve()),
        num_stages=config.curriculum.num_stages,
        family=config.model.family,
        model=model_arguments(config, compiles=context.compiles("train")),
        lora=LoraJob(
            training.lora.rank,
            training.lora.alpha or training.lora.rank,
            training.lora.targets,
            stage_capacities(training.lora.rank, config.curriculum.num_stages, **training.lora.growth),
            from_output=training.lora.unfreeze == "from_output",
        )
        if training.method == "lora"
        else None,
        loss=LossJob(training.loss, training.beta, training.label_smoothing, training.sft_weight),
        empty_prompt_fraction=training.empty_prompt_fraction,
        gradient_checkpointing=training.gradient_checkpointing,
        plain_peak_bytes=training_peak(context.workload, checkpointing=False).total
        if training.gradient_checkpointing == "auto" and gpus and context.workload
        else None,
        gpu_share=min(1.0, gpus),
        optimization=Optimization(
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            max_grad_norm=training.max_grad_norm,
            global_batch_size=training.global_batch_size,
            pairs_per_launch=training.pairs_per_launch,
            zero_stage=training.zero_stage,
            optimizer=training.optimizer,
        ),
        seed=context.training_seed,
        output_dir=str(output_dir),
        commits=CommitJob(
            str(output_dir / COMMITS_DIR), training.updates_per_commit, training.keep_last, training.keep_best
        ),
        max_skipped_updates=training.max_skipped_updates,
        collective_timeout_seconds=training.collective_timeout_seconds,
        guidance_range=training.guidance_range,
        start_dir=context.start_dir,
        reference_is_start=training.reference == "last_round",
        online=OnlineJob(
            str(context.run.step(SCORES).resolve()),
            ranking_rule(config),
            schedule(config),
            pairs_per_stage(config),
            config.curriculum.num_margin_draws,
        )
        if config.curriculum.num_margin_draws
        else None,
        validation=context.validation,
    )
    num_updates = config.curriculum.num_stages * config.curriculum.updates_per_stage
    state = train_adapter(
        job,
        output_dir,
        num_updates=num_updates,
        num_workers=training.num_workers,
        cpus_per_worker=config.resources.trainers.cpus_per_worker,
        gpus_per_worker=gpus,
        max_restarts=training.max_restarts,
        progress=context.progress,
        on_stage=context.on_stage,
    )
    skipped = len(state["skipped"])
    output.counts |= {
        "updates": num_updates - skipped,
        "pairs": (num_updates - skipped) * training.global_batch_size,
        "updates_skipped": skipped,
    }
    output.details["training"] = training.model_dump(mode="json", include=HOW_NOT_WHAT)
    if skipped:
        output.warnings.append(
            f"{skipped} of {num_updates} updates were skipped, for their loss or gradient was not finite:"
            f" {', '.join(map(str, state['skipped'][:10]))}{', ...' * (skipped > 10)}"
        )

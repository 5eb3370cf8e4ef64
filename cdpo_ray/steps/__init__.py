"""Config -> arguments of each step; the steps in pipeline order.

A step's own modules are imported when it runs, so checking a config or skipping finished steps needs neither torch nor
Ray.
"""

import functools

from cdpo_ray.config import Config, Pool
from cdpo_ray.records import COMMITS_DIR, EVALUATION, HELDOUT, SAMPLES, SCORES, STAGES, TRAINING, VALIDATION
from cdpo_ray.resources import Demand
from cdpo_ray.steps.arguments import (
    judge_settings,
    model_arguments,
    model_sha256,
    preference_frame,
    preference_source,
    preferences_sha256,
    prompts_sha256,
    sections_of,
    seed_setting,
    start_sha256,
    user_code_sha256,
)
from cdpo_ray.steps.outcome import evaluate, export
from cdpo_ray.steps.samples import (
    generate,
    import_preferences,
    sample_settings,
    sample_to_compare,
    sampling_to_compare,
    settings_to_compare,
)
from cdpo_ray.steps.scores import score, score_settings
from cdpo_ray.steps.step import Context, Step
from cdpo_ray.steps.training import pairs, train

__all__ = [
    "IMPORT",
    "SIDES_COMPARED",
    "STEPS",
    "Context",
    "Step",
    "demands_of",
    "export",
    "model_arguments",
    "preference_frame",
    "preference_source",
    "sampling_to_compare",
    "steps_of",
]

IMPORT = Step(
    "import",
    SAMPLES,
    lambda config: (
        sections_of(config, "model", "preferences")
        | model_sha256(config)
        | preferences_sha256(config)
        | {
            "generation": config.generation.model_dump(include={"height", "width", "keep_images"}),
        }
    ),
    (),
    import_preferences,
)


STEPS = (
    Step(
        "generate",
        SAMPLES,
        sample_settings,
        (),
        generate,
        resumable=True,
        continues=True,
    ),
    Step(
        "score",
        SCORES,
        score_settings,
        (SAMPLES,),
        score,
        grows=True,
    ),
    Step(
        "pairs",
        STAGES,
        lambda config: (
            sections_of(config, "curriculum")
            | user_code_sha256("curriculum.measure.sha256", config.curriculum.measure)
            | seed_setting(config)
            | {
                "rewards.rank_by": config.rewards.ranking_reward,
                "rewards.weights": config.rewards.ranking_weights,
                "rewards.noise_prompts": config.rewards.noise_prompts,
                "rewards.max_bad_fraction": config.rewards.max_bad_fraction,
                "training.global_batch_size": config.training.global_batch_size,
                "training.seed": config.training.seed,
            }
        ),
        (SCORES,),
        pairs,
    ),
    Step(
        "train",
        TRAINING,
        lambda config: (
            sections_of(config, "model")
            | model_sha256(config)
            | {"training": config.training.outcome}
            | user_code_sha256("training.loss.sha256", config.training.loss.name)
            | start_sha256(config)
            | seed_setting(config)
        ),
        (SAMPLES, SCORES, STAGES),
        train,
        resumable=True,
        continues=True,
        scratch=(COMMITS_DIR,),
    ),
    Step(
        "evaluate",
        EVALUATION,
        lambda config: (
            sections_of(config, "model")
            | model_sha256(config)
            | {"prompts": config.prompts.model_dump(mode="json", exclude={"validation"})}
            | {"generation": config.generation.outcome}
            | {"evaluation": config.evaluation.outcome | {"judges": list(config.evaluation_judges)}}
            | seed_setting(config)
            | judge_settings(config)
            | prompts_sha256(config, "heldout")
        ),
        (TRAINING,),
        evaluate,
        resumable=True,
    ),
)


SIDES_COMPARED = tuple(
    Step(
        f"sample {side}",
        side,
        functools.partial(settings_to_compare, side=side),
        (),
        functools.partial(sample_to_compare, side=side),
        resumable=True,
    )
    for side in (VALIDATION, HELDOUT)
)


def steps_of(config: Config) -> tuple[Step, ...]:
    """Steps of a config: samples are generated, or imported with preferences."""
    return (IMPORT, *STEPS[1:]) if config.preferences else STEPS


def demands_of(step: Step, config: Config) -> list[Demand]:
    """Actors and tasks that a step runs at the same time; a pool starts with one actor and grows as resources allow."""
    resources, trainers = config.resources, config.resources.trainers
    generators = Demand("resources.generators", "actor", *_actors(resources.generators))
    scorers = Demand("resources.scorers", "actor", *_actors(resources.scorers))
    pools: list[Demand] = []
    if step.folder == TRAINING:
        num = config.training.num_workers
        needs = num, num, trainers.cpus_per_worker, trainers.gpus_per_worker, trainers.node_labels
        return [Demand("training.num_workers", "worker", *needs)]
    if step.folder in (SAMPLES, EVALUATION, VALIDATION, HELDOUT):
        both = step.folder == SAMPLES and config.rewards.placement == "pool" and config.rewards.judges_of_one_image
        pools = [generators, scorers] if both else [generators]
    elif step.folder == SCORES:
        pools = [scorers]
    # Ray Data tasks of one CPU each read and write the actors' rows. If actors hold every CPU, the tasks cannot start:
    # judges wait for rows forever, and no image is written before all are generated. Tasks of zero CPUs could start,
    # but also on a cluster's head node, which advertises no CPUs to stay free.
    return [*pools, *(Demand(f"{pool.key}.cpus_per_actor", "task of Ray Data", 1, 1, 1, 0) for pool in pools[:1])]


def _actors(pool: Pool) -> tuple[int, int, float, float, dict[str, str]]:
    return pool.num_actors, 1, pool.cpus_per_actor, pool.gpus_per_actor, pool.node_labels

"""Config -> arguments that several steps share, and what of the config their outcome depends on."""

from pathlib import Path
from typing import Any

from cdpo_ray.config import Config, Pool, PromptSource
from cdpo_ray.errors import ConfigError
from cdpo_ray.parts import read_set_aside
from cdpo_ray.preferences.files import Source
from cdpo_ray.prompts import sources
from cdpo_ray.records import LABEL, score_file
from cdpo_ray.store import StepOutput


def prompt_source(section: PromptSource) -> sources.Source:
    return sources.Source(**section.model_dump())


def preference_source(config: Config) -> Source:
    """Where the preferences of a configuration lie."""
    assert config.preferences is not None, "asked of a config with preferences"
    return Source(**config.preferences.model_dump(include={"path", "format", "columns", "difficulty"}))


def preference_frame(config: Config) -> Any:
    """What imported images are made to fit.

    Raises:
        ConfigError: the size is not given and cannot be known.
    """
    from cdpo_ray.models.sizes import sizes_of
    from cdpo_ray.preferences.images import Frame

    generation, preferences = config.generation, config.preferences
    assert preferences is not None, "asked of a config with preferences"
    sizes = sizes_of(config.model.family, config.model.path, generation.height, generation.width)
    if sizes is None:
        raise ConfigError("`generation.height` and `generation.width` must be given to import images for a hub model")
    return Frame(sizes.height, sizes.width, preferences.max_image_bytes, preferences.max_image_pixels)


def model_arguments(config: Config, *, compiles: bool = False) -> dict[str, Any]:
    """Keyword arguments of the family's ``load``.

    Args:
        compiles: what ``model.compile`` 'auto' means for the step.
    """
    arguments = config.model.model_dump(exclude={"family"}, exclude_none=True)
    return arguments | {"compile": compiles if config.model.compile == "auto" else config.model.compile}


def pool_size(pool: Pool) -> Any:
    from cdpo_ray.streams import PoolSize

    return PoolSize(**pool.model_dump())


def sampling_of(config: Config, images_per_prompt: int, seed: int) -> Any:
    from cdpo_ray.generation.generator import Sampling

    generation = config.generation
    return Sampling(
        seed=seed,
        images_per_prompt=images_per_prompt,
        num_denoising_steps=generation.num_denoising_steps,
        guidance_scale=generation.guidance_scale,
        height=generation.height,
        width=generation.width,
        images_per_batch=generation.images_per_batch,
    )


def schedule(config: Config) -> Any:
    from cdpo_ray.curriculum.schedule import Schedule

    return Schedule(**config.curriculum.model_dump(exclude={"preset", "updates_per_stage", "num_margin_draws"}))


def pairs_per_stage(config: Config) -> int:
    return config.curriculum.updates_per_stage * config.training.global_batch_size


def ranking_rule(config: Config) -> Any:
    from cdpo_ray.curriculum.combination import RankingRule

    rewards = config.rewards
    return RankingRule(
        rewards.ranking_reward,
        rewards.ranking_weights,
        with_noise=rewards.noise_prompts > 0,
        with_labels=config.preferences is not None,
    )


def ranking_files(config: Config) -> list[str]:
    scorings = (False, True) if config.rewards.noise_prompts else (False,)
    files = [score_file(name, second=second) for second in scorings for name in config.rewards.ranking_weights]
    return [*files, score_file(LABEL)] if config.preferences else files


def sections_of(config: Config, *names: str) -> dict[str, Any]:
    plain = config.plain()
    return {name: plain[name] for name in names}


def seed_setting(config: Config) -> dict[str, Any]:
    return {"run.seed": config.run.seed}


def prompts_sha256(section: PromptSource | None) -> str | None:
    return sources.content_sha256(prompt_source(section)) if section else None


def warn_of_set_aside(output: StepOutput, output_dir: Path) -> None:
    from cdpo_ray.generation.set_aside import num_images_without_score

    if num_prompts := output.counts["prompts_set_aside"]:
        output.warnings.append(f"{num_prompts} prompts raise inside the model; set_aside.jsonl says which and why")
    output.counts["images_without_score"] = num_images_without_score(read_set_aside(output_dir))
    if num_images := output.counts["images_without_score"]:
        output.warnings.append(
            f"{num_images} images are black or of values that are not finite and have no score; set_aside.jsonl says"
            " which and why"
        )

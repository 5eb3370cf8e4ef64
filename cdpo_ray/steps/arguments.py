"""Config -> arguments and settings that several steps share."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from cdpo_ray.config import Config, PromptSource
from cdpo_ray.dataflow.parts import read_quarantined
from cdpo_ray.errors import ConfigError
from cdpo_ray.preferences.files import fingerprint
from cdpo_ray.preferences.rows import PreferenceSource
from cdpo_ray.prompts import sources
from cdpo_ray.records import LABEL, score_file
from cdpo_ray.store import StepOutput, files_sha256
from cdpo_ray.user_code import USER_FUNCTION, source_files

CONFIG_ENDINGS = (".json", ".txt", ".jinja", ".model")
MODEL_ENDINGS = (*CONFIG_ENDINGS, ".safetensors")
"""Suffixes of the files loaded from a model's folder; pickles and code are never loaded."""
REWARD_WEIGHTS = ("checkpoint", "processor", "vocabulary", "captioner", "sentence_encoder", "questions")
"""Reward options whose value is a file, a folder or a hub id."""


def preference_source(config: Config) -> PreferenceSource:
    """Location and format of the preferences."""
    assert config.preferences is not None, "called for a config with preferences only"
    return PreferenceSource(**config.preferences.model_dump(include={field.name for field in fields(PreferenceSource)}))


def preference_frame(config: Config) -> Any:
    """Size that imported images are scaled and cropped to, and the limits on their files.

    Raises:
        ConfigError: the size is not given, and a hub model's is unknown.
    """
    from cdpo_ray.models.sizes import sizes_of
    from cdpo_ray.preferences.images import Frame

    generation, preferences = config.generation, config.preferences
    assert preferences is not None, "called for a config with preferences only"
    sizes = sizes_of(config.model.family, config.model.layout.path, generation.height, generation.width)
    if sizes is None:
        raise ConfigError("`generation.height` and `generation.width` must be given to import images for a hub model")
    return Frame(sizes.height, sizes.width, preferences.max_image_bytes, preferences.max_image_pixels)


def model_arguments(config: Config, *, compiles: bool = False) -> dict[str, Any]:
    """Keyword arguments of the family's ``load``.

    Args:
        compiles: value that ``model.compile`` 'auto' resolves to for the step.
    """
    model = config.model
    arguments = model.model_dump(exclude={"family"}, exclude_none=True)
    if config.training.consistency_target == "teacher":
        arguments = {"teacher": {"path": "embedded"}} | arguments
    return arguments | {
        "compile": compiles if model.compile == "auto" else model.compile,
        "guidance_range": config.guidance_range,
        "timesteps": config.timestep_rule,
    }


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


def prompts_sha256(config: Config, side: str) -> dict[str, str | None]:
    """SHA-256 of the source file of a split's prompts, as a setting.

    A split that is a fraction of the training prompts has their source.

    Args:
        side: ``train``, ``heldout`` or ``validation``.

    Raises:
        PromptError: the file cannot be read.
    """
    section: PromptSource | None = getattr(config.prompts, side)
    found = {f"prompts.{side}.sha256": sources.content_sha256(section, side) if section else None}
    if section and section.fraction is not None:
        shared = preferences_sha256(config) if config.preferences else prompts_sha256(config, "train")
        found |= {key: sha256 for key, sha256 in shared.items() if sha256}
    return found


def preferences_sha256(config: Config) -> dict[str, str]:
    """SHA-256 of the preference files and of the images they refer to, as a setting."""
    return {"preferences.files": fingerprint(preference_source(config))}


def model_sha256(config: Config) -> dict[str, str]:
    """SHA-256 of the local model folders and files, as settings; a hub model is identified by its revision.

    Raises:
        StoreError: a file changed while it was read.
    """
    model = config.model
    places = {"model": model.path} | ({"model.teacher": model.teacher.path} if model.teacher else {})
    found = {f"{key}.sha256": weights_sha256(where, key=f"{key}.path") for key, where in places.items()}
    if model.config:
        found["model.config.sha256"] = weights_sha256(
            model.config.path, key="model.config.path", endings=CONFIG_ENDINGS
        )
    return {key: sha256 for key, sha256 in found.items() if sha256}


def start_sha256(config: Config) -> dict[str, str]:
    """SHA-256 of the LoRA that training starts from, as a setting; empty: it starts from the base model.

    Raises:
        StoreError: a file changed while it was read.
    """
    found = weights_sha256(config.training.start_from, key="training.start_from")
    return {"training.start_from.sha256": found} if found else {}


def reward_sha256(config: Config, name: str) -> dict[str, str]:
    """SHA-256 of a reward's local files, by option; of a user-defined reward, of its module or package.

    Weights pinned by ``sha256`` in the config are left out, and so is a missing module, which fails on loading.

    Raises:
        StoreError: a file changed while it was read.
    """
    if USER_FUNCTION.match(name):
        return user_code_sha256("sha256", name)
    options = config.rewards.options(name)
    pinned = ("checkpoint",) if options.get("sha256") else ()
    found = {
        f"{key}.sha256": weights_sha256(options[key], key=f"rewards.{name}.{key}")
        for key in REWARD_WEIGHTS
        if key in options and key not in pinned
    }
    return {key: sha256 for key, sha256 in found.items() if sha256}


def user_code_sha256(key: str, name: str) -> dict[str, str]:
    """SHA-256 of the module or package of a user's function, as a setting; empty for a built-in or a missing one."""
    files = source_files(name) if USER_FUNCTION.match(name) else {}
    return {key: files_sha256(files, where=f"`{name}`")} if files else {}


def judged_with(config: Config, name: str) -> dict[str, Any]:
    """Settings that a reward's scores depend on, besides the images: its options and the SHA-256 of its files."""
    return config.rewards.options(name) | reward_sha256(config, name)


def judge_settings(config: Config) -> dict[str, Any]:
    """Settings of the evaluation's judges: the arguments of each class, and the SHA-256 of its files."""
    judges = config.evaluation_judges
    contents = {
        f"rewards.{name}.{key}": sha256 for name in judges for key, sha256 in reward_sha256(config, name).items()
    }
    return {f"rewards.{name}": options for name, options in judges.items()} | contents


def weights_sha256(where: str | None, *, key: str, endings: tuple[str, ...] | None = MODEL_ENDINGS) -> str | None:
    """SHA-256 of local weights; ``None``: not given, shipped with the package, or a hub id.

    Args:
        endings: of the files of a folder that are read; ``None``: any.
    """
    if where is None or where == "embedded":
        return None
    path = Path(where)
    if path.is_file():
        files = {path.name: path}
    elif path.is_dir():
        within = {str(file.relative_to(path)): file for file in sorted(path.rglob("*")) if file.is_file()}
        files = {
            name: file
            for name, file in within.items()
            if (endings is None or file.suffix in endings)
            and not any(part.startswith(".") for part in Path(name).parts)
        }
    else:
        return None
    return files_sha256(files, where=f"`{key}` {path}")


def warn_of_quarantine(output: StepOutput, output_dir: Path) -> None:
    from cdpo_ray.dataflow.quarantine import num_images_without_score

    if num_prompts := output.counts["prompts_set_aside"]:
        output.warnings.append(f"{num_prompts} prompts failed in the model; see set_aside.jsonl for each error")
    output.counts["images_without_score"] = num_images_without_score(read_quarantined(output_dir))
    if num_images := output.counts["images_without_score"]:
        output.warnings.append(
            f"{num_images} images are black or not finite and have no score; see set_aside.jsonl for each reason"
        )

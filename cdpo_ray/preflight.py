"""Problems that would stop a run after minutes of work, found before it starts."""

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from cdpo_ray.config import HUB_ID, Config, missing_packages
from cdpo_ray.errors import (
    CdpoError,
    ConfigError,
    CurriculumError,
    ModelError,
    PromptError,
    RewardError,
    StoreError,
    TrainingError,
    printable,
)
from cdpo_ray.hub import FETCH_ERRORS, how_to_download
from cdpo_ray.models.folder import folder_of
from cdpo_ray.prompts.questions import read_questions
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.prompts.syntax import quoted_texts
from cdpo_ray.records import EVALUATION, SAMPLES, SCORES, STAGES, STEP_FOLDERS, TRAINING
from cdpo_ray.steps import Step
from cdpo_ray.steps.arguments import REWARD_WEIGHTS, model_arguments
from cdpo_ray.store import delete, write_text
from cdpo_ray.testbed.scenes import parse_caption
from cdpo_ray.user_code import USER_FUNCTION, load_function

EMBEDDED_WORLD_JUDGES = ("oracle", "oracle_strict")
"""Judges that understand only prompts of the embedded world."""
MODEL_KEY = "model.path"
HUB_SECONDS = 10.0
TRIED_SIZE = 64  # pixels
NUM_TRIED = 2


def refuse_problems(config: Config, prompts: PromptSplit, steps: Iterable[Step]) -> None:
    """Raise for everything in a configuration that would stop these steps and that its validation cannot know.

    Args:
        steps: iterated only if some step has a problem, so that an object store that does not answer is found later, by
            the lock, which has a short timeout.

    Raises:
        CdpoError: of the kind that the step would raise; several problems are one `ConfigError`.
    """
    if any(problems_of(config, prompts, {*STEP_FOLDERS})):
        raise_all([*problems_of(config, prompts, {step.folder for step in steps})])


def raise_all(problems: Sequence[CdpoError]) -> None:
    """Raise a single problem unchanged, and several as one `ConfigError`."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError("\n  ".join([f"{len(problems)} problems", *map(str, problems)]))


def try_rewards(config: Config, prompts: PromptSplit) -> list[str]:
    """Call the user's reward functions on two images of random pixels; those that run on a GPU are not called.

    Classes are not instantiated either: they load models.

    Returns:
        One line per function that was called.

    Raises:
        RewardError: a function raises, or does not return one number per image.
    """
    pool = config.resources.scorers if config.rewards.placement == "pool" else config.resources.generators
    names = [name for name in config.evaluation_judges if USER_FUNCTION.match(name)]
    functions = [name for name in names if not isinstance(load_function("reward", name, RewardError), type)]
    if pool.gpus_per_actor or not functions:
        return []
    import torch

    from cdpo_ray.rewards.scorer import Scorer

    size = config.generation.height or TRIED_SIZE, config.generation.width or TRIED_SIZE
    images = torch.randint(256, (NUM_TRIED, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = ([*prompts.train, *prompts.heldout] * NUM_TRIED)[:NUM_TRIED]
    found = Scorer({name: config.rewards.options(name) for name in functions})(images, words)
    return [f"{name} of two images of random pixels: {a:.4g}, {b:.4g}" for name, (a, b) in found.items()]


def refuse_unwritable(path: Path, key: str) -> Path:
    """Write and delete an empty file in a folder, or in the nearest parent that exists.

    Args:
        key: config key of the path, for messages.

    Returns:
        The folder that exists.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        existing = next((folder for folder in (path, *path.parents) if folder.exists()), path)
        probe = existing / f".probe-{os.getpid()}"
        write_text(probe, "")
        delete(probe)
    except (OSError, StoreError) as error:
        raise StoreError(f"`{key}` {path}: cannot be written ({error}); choose another") from None
    return existing


def missing_weights(config: Config) -> list[str]:
    """Hub ids of the model and of rewards whose weights are not in this machine's cache, each with its key."""
    return [f"{key} {place}" for key, (place, _) in _missing(config).items()]


def refuse_unavailable_weights(config: Config, steps: Iterable[Step]) -> None:
    """Request the hub's description of missing weights: a wrong hub id fails before workers start.

    Raises:
        ModelError, RewardError: the hub has no such repository or revision, denies access, or does not answer.
    """
    folders = {step.folder for step in steps}
    for key, (place, revision) in _missing(config).items():
        of_model = key.startswith("model.")
        if not folders & ({SAMPLES, TRAINING, EVALUATION} if of_model else {SAMPLES, SCORES, EVALUATION}):
            continue
        try:
            HfApi().model_info(place, revision=revision, timeout=HUB_SECONDS)
        except FETCH_ERRORS as error:
            error_class = ModelError if of_model else RewardError
            raise error_class(how_to_download(place, "", revision, error, key=key)) from None


def _missing(config: Config) -> dict[str, tuple[str, str | None]]:
    """Key -> hub id and revision of weights that are not on this machine."""
    layout, key = config.model.layout, "model.config.path" if config.model.config else MODEL_KEY
    found = {} if folder_of(layout.path, layout.revision) else {key: (layout.path, layout.revision)}
    for name, options in config.evaluation_judges.items():
        for key in REWARD_WEIGHTS:
            revision = options.get("revision" if key == "checkpoint" else f"{key}_revision")
            if options.get(key) is not None:
                found[f"rewards.{name}.{key}"] = (str(options[key]), revision)
    return {key: weights for key, weights in found.items() if not _is_on_this_machine(*weights)}


def _is_on_this_machine(place: str, revision: str | None) -> bool:
    if os.path.exists(place) or not HUB_ID.match(place) or revision is None:
        return True
    try:
        snapshot_download(place, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def problems_of(config: Config, prompts: PromptSplit, folders: set[str]) -> Iterator[CdpoError]:
    """Problems of the steps with these folders that the validation of the configuration cannot know."""
    keys = config.keys_that_need_bitsandbytes
    if keys and importlib.util.find_spec("bitsandbytes") is None:
        yield ConfigError(f'{", ".join(keys)}: bitsandbytes is not installed; pip install "cdpo_ray[lowmem]"')
    if config.training.start_from and TRAINING in folders:
        from cdpo_ray.models.lora_start import check_start

        try:
            check_start(config.training.start_from, config.model.family, model_arguments(config), config.training.lora)
        except ModelError as error:
            yield error
    judges = config.rewards.judges if folders & {SAMPLES, SCORES} else {}
    judges |= config.evaluation_judges if EVALUATION in folders else {}
    own: list[tuple[str, str, type[CdpoError]]] = [("reward", name, RewardError) for name in judges]
    own += [("measure", config.curriculum.measure, CurriculumError)] if STAGES in folders else []
    own += [("loss", config.training.loss.name, TrainingError)] if TRAINING in folders else []
    for what, name, error_class in own:
        if USER_FUNCTION.match(name):
            try:
                load_function(what, name, error_class)
            except CdpoError as error:
                yield error
    if "vqa" in judges:
        try:
            _refuse_no_questions(config, prompts, folders)
        except (ConfigError, PromptError) as error:
            yield error
    tiny_clip = "clip" in judges and judges["clip"]["architecture"] == "embedded" and config.model.path != "embedded"
    for name in (*EMBEDDED_WORLD_JUDGES, *(["clip"] if tiny_clip else [])):
        judged = [prompt for asked in _judged(name, config, prompts, folders).values() for prompt in asked]
        if other := next((prompt for prompt in judged if not _is_caption(prompt)), None):
            remedy = "give `rewards.clip` an `architecture` and a `checkpoint`, or remove `clip`"
            yield ConfigError(
                f"`{'rewards.names' if name in config.rewards.names else 'evaluation.judges'}`: `{name}` judges only"
                f" prompts of the embedded world (`source: scenes`), got {printable(other)!r};"
                f" {remedy if name == 'clip' else f'remove `{name}`'}"
            )
    yield from _problems_of_ocr(config, prompts, folders)


def _judged(name: str, config: Config, prompts: PromptSplit, folders: set[str]) -> dict[str, list[str]]:
    """Prompts by side whose images a judge scores in the steps of these folders."""
    trained_on = name in config.rewards.judges and folders & {SAMPLES, SCORES}
    evaluated = name in config.evaluation_judges and EVALUATION in folders
    found = {"training": prompts.train if trained_on else [], "held-out": prompts.heldout if evaluated else []}
    return {side: judged for side, judged in found.items() if judged}


def _problems_of_ocr(config: Config, prompts: PromptSplit, folders: set[str]) -> Iterator[CdpoError]:
    judged = _judged("ocr", config, prompts, folders)
    key = "rewards.names" if "ocr" in config.rewards.names else "evaluation.judges"
    if judged and (missing := missing_packages("ocr")):
        yield ConfigError(f"`{key}`: `ocr` {missing}")
    for side, asked in judged.items():
        without = [prompt for prompt in asked if not quoted_texts(prompt)]
        limit, ranks = config.rewards.max_bad_fraction, "ocr" in config.rewards.ranking_weights and STAGES in folders
        if len(without) == len(asked):
            yield ConfigError(
                f"`{key}`: `ocr` scores only images whose prompt has the text to render in quotes, and none of the"
                f" {len(asked)} {side} prompts has; quote it, as in 'a sign that says \"OPEN\"', or remove `ocr`"
            )
        elif side == "training" and ranks and len(without) > limit * len(asked):
            yield ConfigError(
                f"`rewards.names`: `ocr` ranks, but gives no score to images of {len(without)} of {len(asked)} training"
                f" prompts, which have no text in quotes, the first {printable(without[0])!r}: more than"
                f" `rewards.max_bad_fraction` = {limit}; remove these prompts, or raise it, as they form no pairs"
            )


def _refuse_no_questions(config: Config, prompts: PromptSplit, folders: set[str]) -> None:
    """Raise PromptError if the questions of `vqa` cannot be read, and ConfigError if no prompt of a split has any."""
    path = str(config.rewards.vqa.questions)
    questions = read_questions(Path(path))
    splits = {
        "training": prompts.train if "vqa" in config.rewards.names and folders & {SAMPLES, SCORES} else [],
        "held-out": prompts.heldout if EVALUATION in folders else [],
    }
    for split, texts in splits.items():
        if texts and not any(text in questions for text in texts):
            raise ConfigError(
                f"`rewards.vqa.questions` {path}: has questions for none of {len(texts):,} {split} prompts, the first:"
                f" {printable(texts[0])!r}; `cdpo questions` writes them"
            )


def _is_caption(prompt: str) -> bool:
    try:
        parse_caption(prompt)
    except ValueError:
        return False
    return True

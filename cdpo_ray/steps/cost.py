"""Config, prompts and GPU -> workload to estimate; measures the footprint of a model that is not in the table."""

import functools
import json
from pathlib import Path

from cdpo_ray.config import Config
from cdpo_ray.cost.estimate import NumPrompts, Workload
from cdpo_ray.cost.gpus import Gpu
from cdpo_ray.cost.published import KnownFootprint, known_footprint
from cdpo_ray.errors import ModelError
from cdpo_ray.prompts.sources import PromptSplit


def workload_of(config: Config, prompts: PromptSplit, gpu: Gpu) -> tuple[Workload, KnownFootprint]:
    """Workload, and the model's footprint with its source.

    The footprint of a folder whose architecture is not in the table is counted, which imports torch and takes up to a
    minute.

    Raises:
        ModelError: the footprint of a folder's model cannot be counted.
    """
    model = config.model
    known = _footprint(model.family, model.layout.path)
    teacher = None
    if config.training.consistency_target == "teacher":
        teacher = _footprint("stable_diffusion", model.teacher.path if model.teacher else "embedded").footprint
    num_prompts = NumPrompts(len(prompts.train), len(prompts.heldout), len(prompts.validation))
    return Workload(config, num_prompts, known.footprint, gpu, teacher), known


def _footprint(family: str, path: str) -> KnownFootprint:
    return known_footprint(family, path) or _counted(path)


@functools.cache
def _counted(path: str) -> KnownFootprint:
    from cdpo_ray.cost.counting import count_folder

    try:
        return KnownFootprint(count_folder(Path(path)), f"counted from {path}")
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"`model.path` {path}: its cost cannot be counted ({type(error).__name__}: {error}); is it a folder in"
            " diffusers layout?"
        ) from None

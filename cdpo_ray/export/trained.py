"""What is exported, and its settings without paths of this machine."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpo_ray.errors import ExportError
from cdpo_ray.models import model_class
from cdpo_ray.models.lora import LORA_DIR


@dataclass(frozen=True)
class Trained:
    """Trained adapter or model of a run, and its base model.

    Attributes:
        name: name of the run.
        training_dir: `4-training` of the run.
        family: family of the base model.
        model: arguments of the family's ``load`` for the base model.
        created: time of the training, ISO 8601; empty: unknown.
        image_size: width and height of the training images in pixels; `None`: unknown.
    """

    name: str
    training_dir: Path
    family: str
    model: Mapping[str, Any]
    created: str = ""
    image_size: tuple[int, int] | None = None

    @property
    def is_lora(self) -> bool:
        return (self.training_dir / LORA_DIR).is_dir()

    @property
    def base_name(self) -> str:
        """Hub id of the base model, or the name of its folder or file: an export holds no path of this machine."""
        name: str = without_paths(self.model["path"])
        return name

    @property
    def denoiser_name(self) -> str:
        return model_class(self.family).denoiser_name

    def lora_dir(self, format_name: str) -> Path:
        """Folder of the LoRA.

        Raises:
            ExportError: the run used full fine-tuning, so there is no LoRA.
        """
        if not self.is_lora:
            raise ExportError(
                f"`--format` {format_name}: {self.training_dir} holds a full model (`training.method` full), not a"
                " LoRA; use `--format merged`"
            )
        return self.training_dir / LORA_DIR


def is_path(place: str) -> bool:
    """Whether a setting is a path of this machine, and not a hub id, a built-in name or another text."""
    return os.path.isabs(place) or os.path.exists(place)


def without_paths(value: Any) -> Any:
    """Settings in which each path of this machine is replaced by the name of its file or folder."""
    if isinstance(value, Mapping):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, str):
        return os.path.basename(os.path.abspath(value)) if is_path(value) else value
    return [without_paths(each) for each in value] if isinstance(value, Sequence) else value

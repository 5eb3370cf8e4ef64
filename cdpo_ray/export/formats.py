"""Trained adapter or model -> files of each format."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cdpo_ray.errors import ExportError
from cdpo_ray.export.factors import merge, read_factors
from cdpo_ray.models import load_model, model_class
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS, read_lora


@dataclass(frozen=True)
class Trained:
    """Trained adapter or model of a run, and its base model.

    Attributes:
        name: name of the run.
        training_dir: `4-training` of the run.
        family: family of the base model.
        model: arguments of the family's ``load`` for the base model.
    """

    name: str
    training_dir: Path
    family: str
    model: Mapping[str, Any]

    @property
    def is_lora(self) -> bool:
        return (self.training_dir / LORA_DIR).is_dir()

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


def write_diffusers(trained: Trained, output_dir: Path) -> None:
    """Copy the trained LoRA file, which ``pipe.load_lora_weights(folder)`` of diffusers loads, including alpha.

    Raises:
        ExportError: the run used full fine-tuning.
        ModelError: the LoRA is damaged.
    """
    saved = read_lora(trained.lora_dir("diffusers"), trained.denoiser_name)
    shutil.copyfile(saved.path, output_dir / LORA_WEIGHTS)


def write_kohya(trained: Trained, output_dir: Path) -> None:
    """Write the LoRA with the keys of kohya's scripts and one alpha per layer: ``<run>.safetensors``.

    Layers have diffusers' names with dots replaced: ``lora_unet_mid_block_attentions_0_...``, which ComfyUI,
    AUTOMATIC1111 and diffusers read for every UNet family. For transformers, ``lora_transformer_...``, only ComfyUI
    does.

    Raises:
        ExportError: the run used full fine-tuning.
        ModelError: the LoRA is damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer, factors in read_factors(trained.lora_dir("kohya"), trained.denoiser_name).items():
        key = f"lora_{trained.denoiser_name}_{layer.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = factors.down
        tensors[f"{key}.lora_up.weight"] = factors.up
        tensors[f"{key}.alpha"] = torch.tensor(factors.alpha)
    save_file(tensors, kohya_path(output_dir, trained.name), metadata={"format": "pt"})


def kohya_path(output_dir: Path, name: str) -> Path:
    """Path of the file that `write_kohya` writes."""
    return output_dir / f"{name}.safetensors"


def write_merged(trained: Trained, output_dir: Path) -> None:
    """Write the whole pipeline with merged weights, for ``DiffusionPipeline.from_pretrained`` of diffusers.

    Its scheduler is the one that generated the run's images. A LoRA that was trained on a quantised base is merged into
    the original weights of that base.

    Raises:
        ModelError: the base model cannot be loaded, or the LoRA is damaged or does not fit it.
    """
    as_published = {**trained.model, "compile": False, "quantization": None, "offload": False}
    model = load_model(trained.family, **as_published, device="cpu")
    if trained.is_lora:
        read_lora(trained.training_dir / LORA_DIR, trained.denoiser_name).check_fits(model.denoiser)
        merge(model.denoiser, read_factors(trained.training_dir / LORA_DIR, trained.denoiser_name))
    else:
        model.load_tuned(trained.training_dir)
        model.use_tuned(True)
    model.pipeline.save_pretrained(output_dir, safe_serialization=True)

"""What was trained -> the files of each format."""

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
    """What a run trained, and what it is for.

    Attributes:
        name: of the run.
        training_dir: its `4-training`.
        family: of the base model.
        model: arguments of the family's ``load`` that give the base model.
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
            ExportError: the whole net was trained, so that there is none.
        """
        if not self.is_lora:
            raise ExportError(
                f"`--format` {format_name}: {self.training_dir} holds a whole net (`training.method` full), no LoRA;"
                " use `--format merged`"
            )
        return self.training_dir / LORA_DIR


def write_diffusers(trained: Trained, output_dir: Path) -> None:
    """The LoRA as ``pipe.load_lora_weights(folder)`` of diffusers loads it: the trained file itself, alpha included.

    Raises:
        ExportError: the whole net was trained.
        ModelError: the LoRA is damaged.
    """
    saved = read_lora(trained.lora_dir("diffusers"), trained.denoiser_name)
    shutil.copyfile(saved.path, output_dir / LORA_WEIGHTS)


def write_kohya(trained: Trained, output_dir: Path) -> None:
    """The LoRA with the keys that kohya's scripts made common, an alpha a layer: ``<run>.safetensors``.

    Layers have diffusers' names, dots replaced: ``lora_unet_mid_block_attentions_0_...``, which ComfyUI, AUTOMATIC1111
    and diffusers read for every UNet family. Of transformers ComfyUI alone does, under ``lora_transformer_``.

    Raises:
        ExportError: the whole net was trained.
    """
    tensors: dict[str, torch.Tensor] = {}
    for layer, factors in read_factors(trained.lora_dir("kohya"), trained.denoiser_name).items():
        key = f"lora_{trained.denoiser_name}_{layer.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = factors.down
        tensors[f"{key}.lora_up.weight"] = factors.up
        tensors[f"{key}.alpha"] = torch.tensor(factors.alpha)
    save_file(tensors, kohya_path(output_dir, trained.name), metadata={"format": "pt"})


def kohya_path(output_dir: Path, name: str) -> Path:
    """The file that `write_kohya` makes of a run."""
    return output_dir / f"{name}.safetensors"


def write_merged(trained: Trained, output_dir: Path) -> None:
    """The whole pipeline, as ``DiffusionPipeline.from_pretrained`` of diffusers loads it, without a trace of LoRA.

    Its sampler is the one that the run's images were made with. A LoRA that was trained on a quantised base is merged
    into the weights that this base was rounded from.

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

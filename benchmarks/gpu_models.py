"""UNet families in their published architectures with random weights, as folders that the package loads."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import build_lcm, build_sd15, build_sdxl
from diffusers import DiffusionPipeline

from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel

FULL_WIDTH, TINY_WIDTH, TINY_PIXELS = 320, 40, 64


@dataclass(frozen=True)
class Family:
    """Builder of a family, and its usual sampling settings."""

    build: Callable[..., DiffusionPipeline]
    pixels: int
    num_denoising_steps: int
    guidance_scale: float


FAMILIES = {
    "stable_diffusion": Family(build_sd15, 512, 30, 7.5),
    "stable_diffusion_xl": Family(build_sdxl, 1024, 30, 5.0),
    "latent_consistency": Family(build_lcm, 512, 4, 8.5),
}


@dataclass
class Models:
    """Builds each family once on the device, and loads it as a run does.

    Attributes:
        scratch: folder of the built models.
        device: `cuda` or `cpu`.
        tiny: rehearsal with an eighth of the width, shallow, in fp32, with images of 64 pixels, and without Inductor.
    """

    scratch: Path
    device: str
    tiny: bool

    def family(self, name: str) -> Family:
        family = FAMILIES[name]
        if not self.tiny:
            return family
        return dataclasses.replace(family, pixels=TINY_PIXELS, num_denoising_steps=2)

    @property
    def usual_dtype(self) -> str:
        """Usual dtype on the device: a CPU is many times slower in bfloat16."""
        return "float32" if self.tiny else "bfloat16"

    def folder(self, name: str) -> Path:
        """Folder in diffusers layout, with weights in bfloat16."""
        folder = self.scratch / name
        if not folder.is_dir():
            torch.manual_seed(0)
            width, pixels = TINY_WIDTH if self.tiny else FULL_WIDTH, self.family(name).pixels
            with torch.device(self.device):  # billions of random weights take seconds on a GPU, minutes on a CPU
                pipeline = FAMILIES[name].build(width, pixels, shallow=self.tiny)
            pipeline.to(self.device, torch.bfloat16).save_pretrained(folder, safe_serialization=True)
        return folder

    def arguments(self, name: str, *, dtype: str, compiled: bool = False, training: bool = False) -> dict[str, Any]:
        """Arguments of the family's ``load`` in a run."""
        return {
            "path": str(self.folder(name)),
            "dtype": dtype,
            "device": self.device,
            "compile": compiled and not self.tiny,
            "for_training": training,
        }

    def load(
        self,
        name: str,
        *,
        dtype: str,
        compiled: bool = False,
        channels_last: bool = False,
        training: bool = False,
    ) -> TextToImageModel:
        model = load_model(name, **self.arguments(name, dtype=dtype, compiled=compiled, training=training))
        return self.prepared(model, compiled=compiled, channels_last=channels_last)

    def prepared(self, model: TextToImageModel, *, compiled: bool, channels_last: bool) -> TextToImageModel:
        """Set a memory format that a run would not use; in a rehearsal, compile the denoiser without Inductor."""
        if channels_last or (self.tiny and compiled):
            model.denoiser.to(memory_format=torch.channels_last)
        if self.tiny and compiled:
            model.denoiser.compile(backend="eager")
        return model

"""Text-to-image families: load, encode prompts, sample, decode, noise, predict; LoRA."""

import importlib
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")  # read when diffusers is imported

if TYPE_CHECKING:
    from cdpo_ray.models.family import TextToImageModel

FAMILIES = {
    "stable_diffusion": "cdpo_ray.models.stable_diffusion:StableDiffusion",
    "stable_diffusion_xl": "cdpo_ray.models.stable_diffusion_xl:StableDiffusionXL",
    "latent_consistency": "cdpo_ray.models.latent_consistency:LatentConsistency",
    "stable_diffusion_3": "cdpo_ray.models.stable_diffusion_3:StableDiffusion3",
    "flux": "cdpo_ray.models.flux:Flux",
    "flux2": "cdpo_ray.models.flux2:Flux2",
    "z_image": "cdpo_ray.models.z_image:ZImage",
    "qwen_image": "cdpo_ray.models.qwen_image:QwenImage",
    "sana": "cdpo_ray.models.sana:Sana",
}
"""Family in the config -> class, imported on first use: diffusers is heavy. A new family is one file and one entry."""


def model_class(family: str) -> "type[TextToImageModel]":
    """Class of a family.

    Raises:
        KeyError: for a family that is not in `FAMILIES`.
    """
    module, _, name = FAMILIES[family].partition(":")
    found: type[TextToImageModel] = getattr(importlib.import_module(module), name)
    return found


def load_model(family: str, **arguments: Any) -> "TextToImageModel":
    """Load a model of a family; arguments and errors as for `TextToImageModel.load`."""
    return model_class(family).load(**arguments)

"""Model folder -> sizes of its images and latents; does not import torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from cdpo_ray.testbed import PIPELINE_DIR

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}
HUB_LATENTS = {
    **{"stable_diffusion_3": (16, 8), "flux": (16, 8), "flux2": (128, 16)},
    **{"z_image": (16, 8), "qwen_image": (16, 8), "sana": (32, 32)},
}
"""Family -> latent channels, and pixels per latent value, of its published models; (4, 8) in all other families."""
PATCH_SIDES = {"flux2": 2}
"""Side of the patches of VAE latents that a family's latents consist of; 1 in all other families."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of an image and its latents.

    Attributes:
        height, width: of the image, in pixels.
        latent_channels: number of channels of the latents.
        factor: pixels per latent value along each side.
    """

    height: int
    width: int
    latent_channels: int
    factor: int

    @property
    def num_latent_values(self) -> int:
        """Number of latent values of one image."""
        return self.latent_channels * (self.height // self.factor) * (self.width // self.factor)

    def latent_bytes(self, dtype: str) -> int:
        """Size of one image's latents in bytes."""
        return self.num_latent_values * BYTES_OF[dtype]


def sizes_of(family: str, path: str, height: int | None, width: int | None) -> Sizes | None:
    """Sizes from a model folder, or those of the family's published models for a hub id.

    Args:
        height, width: image size in pixels; `None`: the model's native size.

    Returns:
        `None` for a hub id without an image size.
    """
    folder = PIPELINE_DIR if path == "embedded" else Path(path)
    if not folder.is_dir():
        return Sizes(height, width, *HUB_LATENTS.get(family, (4, 8))) if height and width else None
    vae = json.loads((folder / "vae" / "config.json").read_text())
    (levels,) = (vae[key] for key in ("block_out_channels", "encoder_block_out_channels", "dim_mult") if key in vae)
    factor = 2 ** (len(levels) - 1)
    (denoiser,) = (folder / name / "config.json" for name in ("unet", "transformer") if (folder / name).is_dir())
    native = json.loads(denoiser.read_text()).get("sample_size", 128) * factor  # without the key, pipelines use 128
    channels, patch = vae["z_dim"] if "z_dim" in vae else vae["latent_channels"], PATCH_SIDES.get(family, 1)
    return Sizes(height or native, width or native, channels * patch**2, factor * patch)

"""Model on the disk -> sizes of its images and latents; needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

from cdpo_ray.testbed import PIPELINE_DIR

BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}
HUB_LATENT_CHANNELS = {"stable_diffusion_3": 16, "flux": 16}  # of a family's published models; others have 4


@dataclass(frozen=True)
class Sizes:
    """Pixels of an image, channels of its latents, and pixels that a latent value spans on a side."""

    height: int
    width: int
    latent_channels: int
    factor: int

    @property
    def num_latent_values(self) -> int:
        """Of one image."""
        return self.latent_channels * (self.height // self.factor) * (self.width // self.factor)

    def latent_bytes(self, dtype: str) -> int:
        """Of one image."""
        return self.num_latent_values * BYTES_OF[dtype]


def sizes_of(family: str, path: str, height: int | None, width: int | None) -> Sizes | None:
    """Sizes by a model's folder, or those usual for a hub id; none where a hub id's image size is not given.

    Args:
        height, width: of the images, in pixels; none: the model's own.
    """
    folder = PIPELINE_DIR if path == "embedded" else Path(path)
    if not folder.is_dir():
        return Sizes(height, width, HUB_LATENT_CHANNELS.get(family, 4), 8) if height and width else None
    vae = json.loads((folder / "vae" / "config.json").read_text())
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    (denoiser,) = (folder / name / "config.json" for name in ("unet", "transformer") if (folder / name).is_dir())
    native = json.loads(denoiser.read_text()).get("sample_size", 128) * factor  # FLUX's has none; its pipeline says 128
    return Sizes(height or native, width or native, vae["latent_channels"], factor)

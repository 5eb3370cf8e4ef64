"""Folder of the tiny dual encoder -> open_clip model, tokenizer and preprocessing."""

import json
from pathlib import Path

import open_clip
import torch
from open_clip import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn.functional import interpolate

from cdpo_ray.testbed import CLIP_DIR

Channels = tuple[float, float, float]


def load_clip(clip_dir: Path = CLIP_DIR) -> tuple[CLIP, SimpleTokenizer, Channels, Channels, int]:
    """Load the dual encoder with open_clip, in fp32 on the CPU.

    The vocabulary's path is absolute, because open_clip resolves a relative one against the working directory.

    Args:
        clip_dir: folder in open_clip's ``local-dir:`` format.

    Returns:
        model: in evaluation mode; ``encode_image`` takes ``[image, 3, image_size, image_size]``.
        tokenizer: captions -> ``[caption, context_length]`` int64, for ``encode_text``.
        mean, std: of each RGB channel, for pixels in [0, 1].
        image_size: side in pixels.
    """
    name = f"local-dir:{clip_dir}"
    model = open_clip.create_model_from_pretrained(name, return_transform=False)
    tokenizer = open_clip.get_tokenizer(name, bpe_path=str(clip_dir / "bpe.txt.gz"))
    config = json.loads((clip_dir / "open_clip_config.json").read_text())
    preprocess, image_size = config["preprocess_cfg"], config["model_cfg"]["vision_cfg"]["image_size"]
    return model.eval(), tokenizer, tuple(preprocess["mean"]), tuple(preprocess["std"]), image_size


def to_pixels(images: Tensor, mean: Channels, std: Channels, image_size: int) -> Tensor:
    """``[image, 3, height, width]`` uint8 -> ``[image, 3, image_size, image_size]`` fp32 for ``encode_image``."""
    size = (image_size, image_size)
    pixels = interpolate(images.float() / 255, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

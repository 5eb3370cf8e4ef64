"""Images -> predicted human ratings, independent of the prompt, by LAION's head on CLIP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.pixels import centre_crop, normalized
from cdpo_ray.rewards.precision import net_precision
from cdpo_ray.rewards.weights import converted, hub_folder, model_from_folder

LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
"""Consecutive linear layers; the layers between them were dropout."""


class AestheticReward:
    """Predicted rating, about 1 to 10. Source: the LAION-Aesthetics V2 predictor, arXiv:2210.08402.

    Args:
        head: path of the released file.
        head_sha256: SHA-256 of the file.
        checkpoint: CLIP whose embeddings the head was trained on, a folder in transformers' layout or a hub id.
        revision: commit of the hub id.

    Raises:
        RewardError: if weights are missing, or the head does not fit CLIP.
    """

    def __init__(self, head: str, head_sha256: str, checkpoint: str, revision: str | None) -> None:
        key = "rewards.aesthetic.checkpoint"
        weights = converted(Path(head), head_sha256, key="rewards.aesthetic.head")
        folder = hub_folder(checkpoint, revision, key=key)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model_from_folder(CLIPModel, folder, key=key).eval().to(self.device)
        expected = {f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
        width = self.model.config.projection_dim
        if weights.keys() != expected or weights["layers.0.weight"].shape[1] != width:
            raise RewardError(
                f"`rewards.aesthetic.head` {head}: must hold linear layers {', '.join(LAYERS)}, the first with"
                f" {width} inputs, got {', '.join(f'{name} {list(value.shape)}' for name, value in weights.items())}"
            )
        self.head = {name: value.double().to(self.device) for name, value in weights.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        size = self.model.config.vision_config.image_size
        pixels = normalized(centre_crop(images.to(self.device), size), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        with net_precision(self.device):
            features = self.model.get_image_features(pixels).pooler_output
        return ratings(features, self.head).cpu().numpy()


def ratings(embeddings: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """Embeddings ``[image, width]``, normalised here -> predicted ratings ``[image]``, fp64.

    Args:
        head: fp64 weight and bias of each of `LAYERS`.
    """
    values = F.normalize(embeddings.double(), dim=-1)
    for layer in LAYERS:
        values = F.linear(values, head[f"{layer}.weight"], head[f"{layer}.bias"])
    return values.squeeze(-1)

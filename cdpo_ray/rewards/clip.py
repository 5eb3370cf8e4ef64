"""Images -> similarity to the prompt, by any open_clip model."""

import pickle
from collections.abc import Sequence
from typing import Any, Literal

import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.agreement import cosines
from cdpo_ray.rewards.pixels import centre_crop, normalized
from cdpo_ray.rewards.precision import net_precision
from cdpo_ray.rewards.weights import hub_file
from cdpo_ray.testbed.clip import load_clip

HUB_WEIGHTS = "open_clip_model.safetensors"


class ClipReward:
    """Cosine similarity of image and prompt embeddings, -1 to 1. Source: arXiv:2103.00020, arXiv:2104.08718.

    Args:
        architecture: ``embedded``, or one of `open_clip.list_models`.
        checkpoint: local file (safetensors, or a pickle read with ``weights_only``) or hub id; `None` for ``embedded``.
        revision: commit of the hub id.
        scale: ``cosine``, or ``logit``: cosine times the learned logit scale, up to 100.

    Raises:
        RewardError: if the architecture is unknown, or the checkpoint cannot be loaded.
    """

    def __init__(
        self,
        architecture: str = "embedded",
        checkpoint: str | None = None,
        revision: str | None = None,
        scale: Literal["cosine", "logit"] = "cosine",
    ) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any
        if architecture == "embedded":
            model, self.tokenizer, self.mean, self.std, self.image_size = load_clip()
        else:
            model = _load(architecture, checkpoint, revision)
            self.tokenizer = open_clip.get_tokenizer(architecture)
            size = model.visual.image_size
            self.image_size = size[0] if isinstance(size, tuple) else size
            self.mean, self.std = model.visual.image_mean, model.visual.image_std
        self.model = model.eval().to(self.device)
        self.scale = self.model.logit_scale.exp().item() if scale == "logit" else 1

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        pixels = self.preprocess(images)
        with net_precision(self.device):
            features = self.model.encode_image(pixels)
        scores = cosines(features, prompts, self._embed)
        return (self.scale * scores.double()).cpu().numpy()

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize the shorter side, crop the centre, normalise: uint8 -> fp32 ``[image, 3, size, size]``."""
        return normalized(centre_crop(images.to(self.device), self.image_size), self.mean, self.std)

    def _embed(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts).to(self.device)
        with net_precision(self.device):
            return self.model.encode_text(tokens)


def check_architecture(architecture: str, *, key: str) -> None:
    """Check the name of an open_clip model.

    Args:
        key: config key to name in errors.

    Raises:
        RewardError: if open_clip has no such model.
    """
    if architecture not in open_clip.list_models():
        raise RewardError(f"`{key}` must be an architecture of open_clip, got {architecture!r}")


def _load(architecture: str, checkpoint: str | None, revision: str | None) -> torch.nn.Module:
    assert checkpoint is not None, "the config requires a checkpoint for an architecture"
    check_architecture(architecture, key="rewards.clip.architecture")
    path = hub_file(checkpoint, HUB_WEIGHTS, revision, key="rewards.clip.checkpoint")
    try:
        return open_clip.create_model(architecture, pretrained=str(path))
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RewardError(f"`rewards.clip.checkpoint` {path}: does not fit {architecture}: {reason}") from None

"""Images -> agreement with the prompt, by any open_clip model."""

import pickle
from collections.abc import Sequence
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.pixels import centre_crop, normalized
from cdpo_ray.rewards.weights import hub_file
from cdpo_ray.testbed.clip import load_clip

HUB_WEIGHTS = "open_clip_model.safetensors"


class ClipReward:
    """Cosine similarity of image and prompt embeddings, -1 to 1. Source: arXiv:2103.00020, arXiv:2104.08718.

    Args:
        architecture: ``embedded``, or one of `open_clip.list_models`.
        checkpoint: a local file (safetensors, or a pickle read with ``weights_only``), or a hub id.
        revision: commit of the hub id.
    """

    def __init__(
        self, architecture: str = "embedded", checkpoint: str | None = None, revision: str | None = None
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

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray:
        distinct = list(dict.fromkeys(prompts))  # a batch is mostly one prompt many times
        texts = F.normalize(self.model.encode_text(self.tokenizer(distinct).to(self.device)), dim=-1)
        features = F.normalize(self.model.encode_image(self.preprocess(images)), dim=-1)
        return (features * texts[[distinct.index(prompt) for prompt in prompts]]).sum(-1).double().cpu().numpy()

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize the shorter side, crop the centre, normalise: uint8 -> fp32 ``[image, 3, size, size]``."""
        return normalized(centre_crop(images.to(self.device), self.image_size), self.mean, self.std)


def _load(architecture: str, checkpoint: str | None, revision: str | None) -> torch.nn.Module:
    assert checkpoint is not None, "config: an architecture goes with a checkpoint"
    if architecture not in open_clip.list_models():
        raise RewardError(f"`rewards.clip.architecture` must be a name that open_clip knows, got {architecture!r}")
    path = hub_file(checkpoint, HUB_WEIGHTS, revision, key="rewards.clip.checkpoint")
    try:
        return open_clip.create_model(architecture, pretrained=str(path))
    except (RuntimeError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise RewardError(f"`rewards.clip.checkpoint` {path}: does not load into {architecture}: {reason}") from None

"""Images -> predicted human preference, by HPS v2.1: an open_clip model fine-tuned on human choices."""

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.agreement import cosines
from cdpo_ray.rewards.clip import check_architecture
from cdpo_ray.rewards.pixels import letterbox, normalized
from cdpo_ray.rewards.precision import net_precision
from cdpo_ray.rewards.weights import converted, hub_file

HUB_WEIGHTS = "HPS_v2.1_compressed.pt"


class HpsV2Reward:
    """Cosine of image and prompt embeddings, without the logit scale, as released. Source: arXiv:2306.09341.

    Args:
        architecture: one of `open_clip.list_models`; the released model is ViT-H-14.
        checkpoint: path of the released file, or hub id.
        revision: commit of the hub id.
        sha256: SHA-256 of the file.

    Raises:
        RewardError: if the architecture is unknown, or the checkpoint cannot be loaded.
    """

    def __init__(self, architecture: str, checkpoint: str, revision: str | None, sha256: str) -> None:
        check_architecture(architecture, key="rewards.hpsv2.architecture")
        key = "rewards.hpsv2.checkpoint"
        path = hub_file(checkpoint, HUB_WEIGHTS, revision, key=key)
        weights = converted(path, sha256, key=key)
        model = open_clip.CLIP(**open_clip.get_model_config(architecture))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1].strip()
            raise RewardError(f"`{key}` {path}: does not fit {architecture}: {reason}") from None
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.eval().to(self.device)
        self.tokenizer = open_clip.get_tokenizer(architecture)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        pixels = self.preprocess(images)
        with net_precision(self.device):
            features = self.model.encode_image(pixels)
        scores = cosines(features, prompts, self._embed)
        return scores.double().cpu().numpy()

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize the longer side, pad with black, normalise: uint8 -> fp32 ``[image, 3, size, size]``."""
        pixels = letterbox(images.to(self.device), self.model.visual.image_size[0])
        return normalized(pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)

    def _embed(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts).to(self.device)
        with net_precision(self.device):
            return self.model.encode_text(tokens)

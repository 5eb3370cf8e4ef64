"""Images -> predicted human preference, by PickScore: CLIP fine-tuned on human choices."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.agreement import cosines
from cdpo_ray.rewards.precision import net_precision
from cdpo_ray.rewards.weights import from_folder, hub_folder, model_from_folder


class PickScoreReward:
    """Cosine of image and prompt embeddings times the learned logit scale, about 15 to 25. Source: arXiv:2305.01569.

    Args:
        checkpoint: folder in transformers' layout, or hub id.
        revision: commit of the hub id.
        processor: folder or hub id of the tokenizer and image processor, separate as in the released scorer.
        processor_revision: commit of that hub id.

    Raises:
        RewardError: if a folder cannot be loaded, or the tokenizer does not fit the checkpoint.
    """

    def __init__(self, checkpoint: str, revision: str | None, processor: str, processor_revision: str | None) -> None:
        key, processor_key = "rewards.pickscore.checkpoint", "rewards.pickscore.processor"
        folder = hub_folder(checkpoint, revision, key=key)
        settings = hub_folder(processor, processor_revision, key=processor_key, files=("*.json", "*.txt"))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.image_processor = from_folder(CLIPImageProcessor, settings, key=processor_key)
        self.tokenizer = from_folder(CLIPTokenizer, settings, key=processor_key)
        self.model = model_from_folder(CLIPModel, folder, key=key).eval().to(self.device)
        num_embedded = self.model.config.text_config.vocab_size
        if len(self.tokenizer) != num_embedded:
            raise RewardError(
                f"`{processor_key}` {settings}: must have {num_embedded} tokens to fit the checkpoint,"
                f" got {len(self.tokenizer)}"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        pixels = self.image_processor(images.to(self.device), return_tensors="pt").pixel_values
        with net_precision(self.device):
            features = self.model.get_image_features(pixels).pooler_output
        scores = self.model.logit_scale.exp() * cosines(features, prompts, self._embed)
        return scores.double().cpu().numpy()

    def _embed(self, prompts: list[str]) -> Tensor:
        max_length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        with net_precision(self.device):
            return self.model.get_text_features(**tokens.to(self.device)).pooler_output

"""Images -> similarity of their captions to the prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.answers import Question, refuse_faults, warn_of_invalid
from cdpo_ray.rewards.precision import net_precision
from cdpo_ray.rewards.vision_language import model_to_ask
from cdpo_ray.rewards.weights import from_folder, hub_folder, model_from_folder

NAME = "vlm_alignment"
ENCODER_KEY = "rewards.vlm_alignment.sentence_encoder"


class VlmAlignmentReward:
    """Cosine similarity of the sentence embeddings of caption and prompt, -1 to 1; NaN without a caption.

    Source: arXiv:2405.13637 (text alignment), arXiv:2305.13301.

    Args:
        sentence_encoder: folder or hub id.
        sentence_encoder_revision: commit of the hub id.
        captioner: folder or hub id of a vision-language model that runs in this process; `None`: ``endpoint`` is used.
        captioner_revision: commit of the captioner's hub id.
        endpoint: keyword arguments of `Endpoint`.
        instruction: prompt of the captioner.
        max_caption_tokens: maximum number of tokens of a caption.

    Raises:
        RewardError: if a model cannot be loaded, or the endpoint's token is missing.
    """

    def __init__(
        self,
        *,
        sentence_encoder: str,
        sentence_encoder_revision: str | None,
        captioner: str | None,
        captioner_revision: str | None,
        endpoint: Mapping[str, Any] | None,
        instruction: str,
        max_caption_tokens: int,
    ) -> None:
        self.encode = SentenceEncoder(hub_folder(sentence_encoder, sentence_encoder_revision, key=ENCODER_KEY))
        self.instruction = instruction
        self.ask = model_to_ask(
            NAME,
            checkpoint=captioner,
            revision=captioner_revision,
            endpoint=endpoint,
            max_tokens=max_caption_tokens,
            checkpoint_key="captioner",
            captions_only=True,
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        """Scores ``[image]`` of uint8 ``[image, 3, height, width]``, with one prompt each.

        Raises:
            RewardError: if no image could be captioned.
        """
        captions = self.ask(images, [Question(self.instruction, (number,)) for number in range(len(prompts))])
        refuse_faults(NAME, captions)
        warn_of_invalid(NAME, [caption.fault for caption in captions], "an image without a caption has no score")
        similarity = (self.encode([caption.text for caption in captions]) * self.encode(prompts)).sum(-1)
        return np.where([bool(caption.fault) for caption in captions], np.nan, similarity.double().cpu().numpy())


class SentenceEncoder:
    """Sentences -> normalised embeddings ``[sentence, channel]``: the mean of an encoder's last layer over the tokens.

    Source: arXiv:1908.10084.

    Raises:
        RewardError: if the folder cannot be loaded, or configures another pooling.
    """

    def __init__(self, folder: Path) -> None:
        pooling = folder / "1_Pooling" / "config.json"
        if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens", True):
            raise RewardError(
                f"`{ENCODER_KEY}` {folder}: must pool by the mean over tokens, got another pooling in"
                f" {pooling.relative_to(folder)}; give for example sentence-transformers/all-MiniLM-L6-v2"
            )
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = from_folder(AutoTokenizer, folder, key=ENCODER_KEY)
        model: Any = model_from_folder(AutoModel, folder, key=ENCODER_KEY, unused=["pooler."])
        self.model = model.eval().to(self.device)
        self.max_tokens = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, sentences: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        with net_precision(self.device):
            states = self.model(**tokens).last_hidden_state
        mask = tokens.attention_mask[..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

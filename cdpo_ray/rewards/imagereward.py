"""Images -> what people prefer, by ImageReward: BLIP reads image and prompt together, a small head scores."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.pixels import centre_crop, normalized
from cdpo_ray.rewards.precision import net_precision
from cdpo_ray.rewards.weights import converted, hub_file

HUB_WEIGHTS = "ImageReward.pt"
HUB_VOCABULARY = "vocab.txt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output over the published training set
MAX_TOKENS = 35
HEAD_LAYERS = ("0", "2", "4", "6", "7")  # linear; those between dropped values in training, and nothing more
ATTENTION_HEAD_WIDTH = 64  # in the image's and in the text's encoder

ORIGINAL_NAMES = (
    ("visual_encoder.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("visual_encoder.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("visual_encoder.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("visual_encoder.post_layernorm", "visual_encoder.norm"),
    ("visual_encoder.encoder.layers", "visual_encoder.blocks"),
    (".self_attn.projection", ".attn.proj"),
    (".self_attn.", ".attn."),
    (".layer_norm1", ".norm1"),
    (".layer_norm2", ".norm2"),
)
"""Part of a weight's name here -> the same in BLIP's own code, which published the checkpoint."""

UNREAD = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")
"""What the checkpoint holds besides: projections for a contrastive loss, and numbers that count up from 0."""


class ImageReward:
    """Human preference as a z-score over the published training set, unbounded. Source: arXiv:2304.05977.

    Args:
        checkpoint: the released file, or a hub id.
        revision: commit of the hub id.
        sha256: of the file.
        vocabulary: BERT's uncased ``vocab.txt``, or a hub id.
        vocabulary_revision: commit of that hub id.
    """

    def __init__(
        self, checkpoint: str, revision: str | None, sha256: str, vocabulary: str, vocabulary_revision: str | None
    ) -> None:
        path = hub_file(checkpoint, HUB_WEIGHTS, revision, key="rewards.imagereward.checkpoint")
        words = hub_file(vocabulary, HUB_VOCABULARY, vocabulary_revision, key="rewards.imagereward.vocabulary")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = _load(path, sha256).eval().to(self.device)
        self.tokenizer = BertTokenizer(vocab=str(words))
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        num_embedded = self.model.text_encoder.config.vocab_size
        if len(self.tokenizer) != num_embedded:
            raise RewardError(
                f"`rewards.imagereward.vocabulary` {words}: must hold {num_embedded - 2} words, as the checkpoint does"
                f" beside [DEC] and [ENC], got {len(self.tokenizer) - 2}; give that of bert-base-uncased"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        size = self.model.visual_encoder.config.image_size
        pixels = normalized(centre_crop(images.to(self.device), size), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        texts = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        with net_precision(self.device):
            states = self.model.encode(pixels, texts.input_ids, texts.attention_mask)
        found = self.model.head(states)
        return ((found.double() - MEAN) / STD).cpu().numpy()


class BlipWithHead(nn.Module):
    """BLIP's two encoders, of which the text's attends to the image, and a linear head; sizes as the weights have them.

    Args:
        weights: by their names in the checkpoint.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        _, num_places, vision_width = weights["blip.visual_encoder.pos_embed"].shape
        patch_size = weights["blip.visual_encoder.patch_embed.proj.weight"].shape[-1]
        vocab_size, text_width = weights["blip.text_encoder.embeddings.word_embeddings.weight"].shape
        self.visual_encoder = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=vision_width,
                intermediate_size=len(weights["blip.visual_encoder.blocks.0.mlp.fc1.bias"]),
                num_hidden_layers=_num_numbered(weights, "blip.visual_encoder.blocks."),
                num_attention_heads=vision_width // ATTENTION_HEAD_WIDTH,
                image_size=math.isqrt(num_places - 1) * patch_size,
                patch_size=patch_size,
                layer_norm_eps=1e-6,
            )
        )
        self.text_encoder = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocab_size,
                hidden_size=text_width,
                encoder_hidden_size=vision_width,
                intermediate_size=len(weights["blip.text_encoder.encoder.layer.0.intermediate.dense.bias"]),
                num_hidden_layers=_num_numbered(weights, "blip.text_encoder.encoder.layer."),
                num_attention_heads=text_width // ATTENTION_HEAD_WIDTH,
                max_position_embeddings=len(weights["blip.text_encoder.embeddings.position_embeddings.weight"]),
            ),
            add_pooling_layer=False,
        )
        shapes = {number: weights[f"mlp.layers.{number}.weight"].shape for number in HEAD_LAYERS}
        layers = nn.Sequential()
        for number, (outputs, inputs) in shapes.items():
            layers.add_module(number, nn.Linear(inputs, outputs))
        self.mlp = nn.ModuleDict({"layers": layers})

    def encode(self, pixels: Tensor, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """State of each text's first token, which has attended to the image: ``[image, channel]``.

        Args:
            pixels: ``[image, 3, size, size]``.
            token_ids, attention_mask: ``[image, token]``.
        """
        seen = self.visual_encoder(pixels).last_hidden_state
        states: Tensor = self.text_encoder(token_ids, attention_mask, encoder_hidden_states=seen).last_hidden_state
        return states[:, 0]

    def head(self, states: Tensor) -> Tensor:
        """Score of each image, ``[image]``, from what `encode` returns."""
        score: Tensor = self.mlp["layers"](states).squeeze(-1)
        return score


def original_name(name: str) -> str:
    """A weight's name in `BlipWithHead` -> its name in the checkpoint."""
    if name.startswith("mlp."):
        return name
    if name.startswith("visual_encoder."):
        for here, original in ORIGINAL_NAMES:
            name = name.replace(here, original)
    return f"blip.{name}"


def _num_numbered(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def _load(path: Path, sha256: str) -> BlipWithHead:
    weights = converted(path, sha256, key="rewards.imagereward.checkpoint")
    where = f"`rewards.imagereward.checkpoint` {path}: is not ImageReward's"
    try:
        model = BlipWithHead(weights)
    except KeyError as error:
        raise RewardError(f"{where}: lacks {error}") from None
    names = {original_name(name): name for name in model.state_dict()}
    unknown = {name for name in weights if not UNREAD.match(name)} - names.keys()
    for what, found in (("lacks", names.keys() - weights.keys()), ("has the unknown", unknown)):
        if found:
            raise RewardError(
                f"{where}: {what} {sorted(found)[0]!r}" + f" and {len(found) - 1} more" * (len(found) > 1)
            )
    try:
        model.load_state_dict({name: weights[original] for original, name in names.items()})
    except RuntimeError as error:
        raise RewardError(f"{where}: {str(error).splitlines()[-1].strip()}") from None
    return model

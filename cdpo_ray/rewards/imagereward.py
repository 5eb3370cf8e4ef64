"""Images -> predicted human preference, by ImageReward: BLIP encodes image and prompt jointly, an MLP scores."""

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
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the MLP's output over the published training set
MAX_TOKENS = 35
HEAD_LAYERS = ("0", "2", "4", "6", "7")  # linear; the layers between them were dropout
ATTENTION_HEAD_WIDTH = 64  # of both encoders

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
"""Part of a weight's name in transformers -> the same in BLIP's code, which the checkpoint uses."""

UNUSED = re.compile(r"blip\.(vision_proj|text_proj)\.|.*\.position_ids$")
"""Weights of the checkpoint that are not needed: projections for a contrastive loss, and position indices."""


class ImageReward:
    """Human preference as a z-score over the published training set, unbounded. Source: arXiv:2304.05977.

    Args:
        checkpoint: path of the released file, or hub id.
        revision: commit of the hub id.
        sha256: SHA-256 of the file.
        vocabulary: path of BERT's uncased ``vocab.txt``, or hub id.
        vocabulary_revision: commit of that hub id.

    Raises:
        RewardError: if a file is missing, the checkpoint is not ImageReward's, or the vocabulary does not fit it.
    """

    def __init__(
        self, checkpoint: str, revision: str | None, sha256: str, vocabulary: str, vocabulary_revision: str | None
    ) -> None:
        path = hub_file(checkpoint, HUB_WEIGHTS, revision, key="rewards.imagereward.checkpoint")
        key = "rewards.imagereward.vocabulary"
        vocabulary_path = hub_file(vocabulary, HUB_VOCABULARY, vocabulary_revision, key=key)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = _load(path, sha256).eval().to(self.device)
        self.tokenizer = BertTokenizer(vocab=str(vocabulary_path))
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        num_embedded = self.model.text_encoder.config.vocab_size
        if len(self.tokenizer) != num_embedded:
            raise RewardError(
                f"`{key}` {vocabulary_path}: must hold {num_embedded - 2} tokens to fit the checkpoint, got"
                f" {len(self.tokenizer) - 2}; give the vocabulary of bert-base-uncased"
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
    """BLIP's image encoder, its text encoder with cross-attention to the image, and an MLP.

    Args:
        weights: name in the checkpoint -> weight; their shapes define the sizes.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        _, num_positions, vision_width = weights["blip.visual_encoder.pos_embed"].shape
        patch_size = weights["blip.visual_encoder.patch_embed.proj.weight"].shape[-1]
        vocab_size, text_width = weights["blip.text_encoder.embeddings.word_embeddings.weight"].shape
        self.visual_encoder = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=vision_width,
                intermediate_size=len(weights["blip.visual_encoder.blocks.0.mlp.fc1.bias"]),
                num_hidden_layers=_num_numbered(weights, "blip.visual_encoder.blocks."),
                num_attention_heads=vision_width // ATTENTION_HEAD_WIDTH,
                image_size=math.isqrt(num_positions - 1) * patch_size,
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
        """Hidden state of each text's first token: ``[image, channel]``.

        Args:
            pixels: normalised, ``[image, 3, size, size]``.
            token_ids, attention_mask: ``[image, token]``.
        """
        image_states = self.visual_encoder(pixels).last_hidden_state
        output = self.text_encoder(token_ids, attention_mask, encoder_hidden_states=image_states)
        states: Tensor = output.last_hidden_state
        return states[:, 0]

    def head(self, states: Tensor) -> Tensor:
        """Score of each image, ``[image]``, from the states of `encode`."""
        score: Tensor = self.mlp["layers"](states).squeeze(-1)
        return score


def original_name(name: str) -> str:
    """Name of a weight in `BlipWithHead` -> name in the checkpoint."""
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
    where = f"`rewards.imagereward.checkpoint` {path}: is not a checkpoint of ImageReward"
    try:
        model = BlipWithHead(weights)
    except KeyError as error:
        raise RewardError(f"{where}: lacks {error}") from None
    names = {original_name(name): name for name in model.state_dict()}
    unknown = {name for name in weights if not UNUSED.match(name)} - names.keys()
    for what, found in (("lacks", names.keys() - weights.keys()), ("has the unknown weight", unknown)):
        if found:
            raise RewardError(
                f"{where}: {what} {sorted(found)[0]!r}" + f" and {len(found) - 1} more" * (len(found) > 1)
            )
    try:
        model.load_state_dict({name: weights[original] for original, name in names.items()})
    except RuntimeError as error:
        raise RewardError(f"{where}: {str(error).splitlines()[-1].strip()}") from None
    return model

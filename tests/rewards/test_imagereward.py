"""ImageReward: the released format at reduced size, against an independent implementation of BLIP."""

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards import weights as reward_weights
from cdpo_ray.rewards.imagereward import BlipWithHead, ImageReward, original_name

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", "##s", "play", "##ing", "ch", "##ess", "."
]  # fmt: skip
CLS, SEP, A, CAT, S, PLAY, ING, CH, ESS, DOT, DEC, ENC = 2, 3, 5, 7, 9, 10, 11, 12, 13, 14, 15, 16
VISION, TEXT, SIZE, PATCH = 128, 64, 32, 8
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sizes:
    vision: int = VISION
    vision_inner: int = 96
    vision_depth: int = 2
    image: int = SIZE
    patch: int = PATCH
    text: int = TEXT
    text_inner: int = 80
    text_depth: int = 2
    words: int = len(WORDS) + 2
    places: int = 40
    shared: int = 16
    head: tuple[int, ...] = (24, 16, 12, 8, 1)


PUBLISHED = Sizes(1024, 4096, 24, 224, 16, 768, 3072, 12, 30524, 512, 256, (1024, 128, 64, 16, 1))


def released_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name in the code of BLIP and ImageReward -> shape of every weight."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, outputs: int, *inputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, *inputs), (outputs,)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    shapes[f"{vision}.cls_token"] = (1, 1, sizes.vision)
    shapes[f"{vision}.pos_embed"] = (1, (sizes.image // sizes.patch) ** 2 + 1, sizes.vision)
    layer(f"{vision}.patch_embed.proj", sizes.vision, 3, sizes.patch, sizes.patch)
    layer(f"{vision}.norm", sizes.vision)
    for number in range(sizes.vision_depth):
        block = f"{vision}.blocks.{number}"
        layer(f"{block}.norm1", sizes.vision)
        layer(f"{block}.norm2", sizes.vision)
        layer(f"{block}.attn.qkv", 3 * sizes.vision, sizes.vision)
        layer(f"{block}.attn.proj", sizes.vision, sizes.vision)
        layer(f"{block}.mlp.fc1", sizes.vision_inner, sizes.vision)
        layer(f"{block}.mlp.fc2", sizes.vision, sizes.vision_inner)
    shapes[f"{text}.embeddings.word_embeddings.weight"] = (sizes.words, sizes.text)
    shapes[f"{text}.embeddings.position_embeddings.weight"] = (sizes.places, sizes.text)
    layer(f"{text}.embeddings.LayerNorm", sizes.text)
    for number in range(sizes.text_depth):
        block = f"{text}.encoder.layer.{number}"
        for attention, width in (("attention", sizes.text), ("crossattention", sizes.vision)):
            layer(f"{block}.{attention}.self.query", sizes.text, sizes.text)
            layer(f"{block}.{attention}.self.key", sizes.text, width)
            layer(f"{block}.{attention}.self.value", sizes.text, width)
            layer(f"{block}.{attention}.output.dense", sizes.text, sizes.text)
            layer(f"{block}.{attention}.output.LayerNorm", sizes.text)
        layer(f"{block}.intermediate.dense", sizes.text_inner, sizes.text)
        layer(f"{block}.output.dense", sizes.text, sizes.text_inner)
        layer(f"{block}.output.LayerNorm", sizes.text)
    layer("blip.vision_proj", sizes.shared, sizes.vision)
    layer("blip.text_proj", sizes.shared, sizes.text)
    widths = (sizes.text, *sizes.head)
    for number, inputs, outputs in zip((0, 2, 4, 6, 7), widths, sizes.head, strict=False):
        layer(f"mlp.layers.{number}", outputs, inputs)
    return shapes


def random_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    scale = {1: 0.3, 2: 0.15, 3: 0.5, 4: 0.05}
    found = {
        name: torch.randn(shape, generator=draw) * scale[len(shape)] for name, shape in released_shapes(Sizes()).items()
    }
    for name in found:
        if re.search(r"(norm\d?|LayerNorm)\.weight$", name):
            found[name] += 1
    return found | {"blip.text_encoder.embeddings.position_ids": torch.arange(40).expand(1, -1).clone()}


class PlainImageReward:
    """Independent implementation in float64, by the original names of the weights."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = {name: weight.double() for name, weight in weights.items() if weight.is_floating_point()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multi-head attention, one head of width 64 after another; without padding."""
        heads = []
        for start in range(0, query.shape[-1], 64):
            q, k, v = (x[:, start : start + 64] for x in (query, key, value))
            weights = (q @ k.T / 8).exp()
            heads.append(weights / weights.sum(-1, keepdim=True) @ v)
        return torch.cat(heads, -1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """``[3, size, size]`` -> ``[1 + patch, channel]``."""
        root = "blip.visual_encoder"
        kernel = self.weights[f"{root}.patch_embed.proj.weight"].reshape(VISION, -1)
        patches = [
            kernel @ pixels[:, top : top + PATCH, left : left + PATCH].reshape(-1)
            for top in range(0, SIZE, PATCH)
            for left in range(0, SIZE, PATCH)
        ]
        x = torch.stack(patches) + self.weights[f"{root}.patch_embed.proj.bias"]
        x = torch.cat([self.weights[f"{root}.cls_token"][0], x]) + self.weights[f"{root}.pos_embed"][0]
        for number in range(2):
            block = f"{root}.blocks.{number}"
            mixed = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            x = x + self.linear(f"{block}.attn.proj", self.attend(*mixed.split(VISION, -1)))
            inner = self.gelu(self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6)))
            x = x + self.linear(f"{block}.mlp.fc2", inner)
        return self.norm(f"{root}.norm", x, 1e-6)

    def encode_text(self, token_ids: list[int], image_states: Tensor) -> Tensor:
        """Token ids and image states -> ``[token, channel]``."""
        root = "blip.text_encoder"
        x = self.weights[f"{root}.embeddings.word_embeddings.weight"][token_ids]
        x = x + self.weights[f"{root}.embeddings.position_embeddings.weight"][: len(token_ids)]
        x = self.norm(f"{root}.embeddings.LayerNorm", x, 1e-12)
        for number in range(2):
            block = f"{root}.encoder.layer.{number}"
            for kind, source in (("attention", None), ("crossattention", image_states)):
                name = f"{block}.{kind}"
                keys = x if source is None else source
                query = self.linear(f"{name}.self.query", x)
                key, value = (self.linear(f"{name}.self.{part}", keys) for part in ("key", "value"))
                x = self.norm(
                    f"{name}.output.LayerNorm",
                    x + self.linear(f"{name}.output.dense", self.attend(query, key, value)),
                    1e-12,
                )
            inner = self.gelu(self.linear(f"{block}.intermediate.dense", x))
            x = self.norm(f"{block}.output.LayerNorm", x + self.linear(f"{block}.output.dense", inner), 1e-12)
        return x

    def score(self, pixels: Tensor, token_ids: list[int]) -> float:
        x = self.encode_text(token_ids, self.encode_image(pixels.double()))[0]
        for number in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{number}", x)
        return (x.item() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module", autouse=True)
def converted_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(reward_weights, "CONVERTED_DIR", tmp_path_factory.mktemp("converted"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return str(path)


def saved(weights: object, folder: Path) -> tuple[str, None, str]:
    """Save a checkpoint in the released format; returns the reward's arguments."""
    torch.save(weights, folder / "ImageReward.pt")
    return (
        str(folder / "ImageReward.pt"),
        None,
        hashlib.sha256((folder / "ImageReward.pt").read_bytes()).hexdigest(),
    )


@pytest.fixture(scope="module")
def reward(vocabulary: str, tmp_path_factory: pytest.TempPathFactory) -> ImageReward:
    return ImageReward(*saved(random_weights(), tmp_path_factory.mktemp("checkpoint")), vocabulary, None)


def images_of(count: int, height: int, width: int) -> Tensor:
    coarse = torch.rand(count, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).to(torch.uint8)


def prepared(image: Tensor) -> Tensor:
    pixels = image.double() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


PROMPTS = {
    "a cat playing chess.": [CLS, A, CAT, PLAY, ING, CH, ESS, DOT, SEP],
    "Cats": [CLS, CAT, S, SEP],
    "": [CLS, SEP],
    "a [ENC] cat [DEC]": [CLS, A, ENC, CAT, DEC, SEP],
    "cat " * 50: [CLS, *[CAT] * 33, SEP],
}
"""Prompt -> expected tokens: split into words, lower case, truncated at 35."""


def test_scores_equal_the_independent_implementation(reward: ImageReward) -> None:
    images, plain = images_of(len(PROMPTS), SIZE, SIZE), PlainImageReward(random_weights())
    expected = [
        plain.score(prepared(image), token_ids) for image, token_ids in zip(images, PROMPTS.values(), strict=True)
    ]
    found = reward(images, list(PROMPTS))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert np.std(expected) > 0.05


def test_a_score_depends_on_the_image_and_on_the_prompt(reward: ImageReward) -> None:
    image, other = images_of(2, SIZE, SIZE)
    same, another_image, another_prompt = reward(torch.stack([image, other, image]), ["a cat", "a cat", "the dogs"])
    assert min(abs(same - another_image), abs(same - another_prompt)) > 1e-3


def test_a_large_image_is_resized_and_cropped_as_by_pil(reward: ImageReward) -> None:
    image = images_of(1, 50, 81)[0]
    small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((51, 32), Image.Resampling.BICUBIC)
    cropped = torch.from_numpy(np.asarray(small)[:, 10:42].copy()).permute(2, 0, 1)
    expected = PlainImageReward(random_weights()).score(prepared(cropped), PROMPTS["Cats"])
    assert reward(image[None], ["Cats"])[0] == pytest.approx(expected, abs=5e-3)


def test_the_published_shapes_build_the_published_model() -> None:
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in released_shapes(PUBLISHED).items()}
        model = BlipWithHead(weights)
    # the published file has 1,786,880,927 bytes; the rest is the archive's index
    assert 0 < 1_786_880_927 - 4 * sum(weight.numel() for weight in weights.values()) < 500_000
    assert {original_name(name): weight.shape for name, weight in model.state_dict().items()} == {
        name: weight.shape
        for name, weight in weights.items()
        if not name.startswith(("blip.vision_proj", "blip.text_proj"))
    }
    vision, text = model.visual_encoder.config, model.text_encoder.config
    assert (vision.num_attention_heads, vision.image_size, text.num_attention_heads) == (16, 224, 12)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mlp.layers.4.weight": None}, "lacks 'mlp.layers.4.weight'"),
        ({"blip.visual_encoder.cls_token": None}, "lacks 'blip.visual_encoder.cls_token'"),
        (
            {f"blip.visual_encoder.blocks.1.norm{n}.{part}": None for n in (1, 2) for part in ("weight", "bias")},
            "lacks 'blip.visual_encoder.blocks.1.norm1.bias' and 3 more",
        ),
        ({"blip.text_encoder.pooler.dense.bias": 3}, "has the unknown weight 'blip.text_encoder.pooler.dense.bias'"),
        ({"mlp.layers.4.bias": 3}, r"size mismatch for mlp.layers.4.bias: .*torch.Size\(\[3\]\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_names_of_its_weights(
    change: dict[str, int | None], reason: str, vocabulary: str, tmp_path: Path
) -> None:
    weights = random_weights() | {name: torch.zeros(size) for name, size in change.items() if size}
    weights = {name: weight for name, weight in weights.items() if change.get(name, 1) is not None}
    with pytest.raises(
        RewardError,
        match=rf"`rewards\.imagereward\.checkpoint` .*: is not a checkpoint of ImageReward: {reason}",
    ):
        ImageReward(*saved(weights, tmp_path), vocabulary, None)


def test_a_vocabulary_that_does_not_fit_the_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n".join([*WORDS, "bird"]) + "\n")
    with pytest.raises(RewardError, match=r"`rewards\.imagereward\.vocabulary` .*: must hold 15 tokens.*, got 16;"):
        ImageReward(*saved(random_weights(), tmp_path), str(tmp_path / "words.txt"), None)


def test_a_checkpoint_that_runs_code_is_refused_and_does_not_run(vocabulary: str, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(RewardError, match=r"ImageReward\.pt: holds more than tensors and was not run"):
        ImageReward(*saved(random_weights() | {"evil": Evil()}, tmp_path), vocabulary, None)
    assert not (tmp_path / "ran").exists()

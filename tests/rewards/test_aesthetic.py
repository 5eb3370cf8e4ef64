"""The aesthetic predictor against plain transformers and a float64 implementation of the head."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from reward_models import build_tiny_clip, pil, sha256, smooth_images
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers import CLIPModel

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.aesthetic import AestheticReward, ratings

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

RECORDED = [4.464580885594412, 5.480434543043335, 5.008130865594411, 5.67625658970988]
"""Ratings of the released head by `recomputed` for `default_rng(0).standard_normal((4, 768))`."""


def save_head(path: Path, width: int) -> Path:
    """Save a random head in the released format: a module whose `layers` hold dropouts between the linear ones."""
    torch.manual_seed(0)
    module = nn.Module()
    module.layers = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    weights = {name: 3 * value for name, value in module.state_dict().items()}  # else ratings hardly differ
    torch.save(weights, path)
    return path


def recomputed(embeddings: NDArray, head: Mapping[str, Tensor]) -> NDArray:
    """Ratings in float64 by numpy: normalise the embedding, then multiply by each matrix."""
    values = embeddings.astype(np.float64)
    values /= np.sqrt((values**2).sum(axis=1, keepdims=True))
    for place in (0, 2, 4, 6, 7):
        weight, bias = (head[f"layers.{place}.{part}"].numpy().astype(np.float64) for part in ("weight", "bias"))
        values = values @ weight.T + bias
    return values[:, 0]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("aesthetic"))


@pytest.fixture(autouse=True)
def converted_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdpo_ray.rewards.weights.CONVERTED_DIR", tmp_path / "converted")


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (50, 81), (97, 40), (20, 28)])
def test_ratings_equal_those_of_transformers_torchvision_and_numpy(
    tiny_clip: Path, tmp_path: Path, height: int, width: int
) -> None:
    path = save_head(tmp_path / "head.pth", width=12)
    transform = Compose([Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), Normalize(MEAN, STD)])
    images = smooth_images(3, height, width)
    with torch.no_grad():
        pixels = torch.stack([transform(pil(image)) for image in images])
        embeddings = CLIPModel.from_pretrained(tiny_clip).get_image_features(pixels).pooler_output
    expected = recomputed(embeddings.numpy(), torch.load(path, weights_only=True))
    scores = AestheticReward(str(path), sha256(path), str(tiny_clip), None)(images, ["x", "y", "z"])
    exact = (height, width) == (32, 32)  # else PIL rounds to 256 levels after resizing each axis
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6 if exact else 0.04)
    assert scores.std() > 0.1
    assert scores.dtype == np.float64


def test_a_rating_does_not_depend_on_the_embeddings_norm(tmp_path: Path) -> None:
    head = torch.load(save_head(tmp_path / "head.pth", width=768), weights_only=True)
    embeddings = torch.randn(5, 768, generator=torch.Generator().manual_seed(0))
    found = ratings(embeddings, {name: value.double() for name, value in head.items()})
    np.testing.assert_allclose(found, recomputed(embeddings.numpy(), head), rtol=1e-12)
    again = ratings(3 * embeddings, {name: value.double() for name, value in head.items()})
    np.testing.assert_allclose(again, found, rtol=1e-6)


@pytest.mark.skipif("CDPO_AESTHETIC_HEAD" not in os.environ, reason="CDPO_AESTHETIC_HEAD names no released head")
def test_the_released_head_rates_fixed_embeddings_as_recorded() -> None:
    head = torch.load(os.environ["CDPO_AESTHETIC_HEAD"], map_location="cpu", weights_only=True)
    embeddings = np.random.default_rng(0).standard_normal((4, 768))
    found = ratings(torch.from_numpy(embeddings), {name: value.double() for name, value in head.items()})
    np.testing.assert_allclose(found, recomputed(embeddings, head), rtol=1e-12)
    np.testing.assert_allclose(found, RECORDED, rtol=1e-9)


@pytest.mark.parametrize("width", [768, 11])
def test_a_head_for_other_embeddings_is_refused(tiny_clip: Path, tmp_path: Path, width: int) -> None:
    path = save_head(tmp_path / "head.pth", width=width)
    message = (
        rf"`rewards\.aesthetic\.head` .*/head\.pth: must hold .* first with 12 inputs, got .*weight \[1024, {width}\]"
    )
    with pytest.raises(RewardError, match=message):
        AestheticReward(str(path), sha256(path), str(tiny_clip), None)


def test_a_file_without_a_head_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1, 12), "bias": torch.zeros(1)}, tmp_path / "linear.pth")
    with pytest.raises(RewardError, match=r"/linear\.pth: must hold .* layers\.0, .* got bias \[1\], weight \[1, 12\]"):
        AestheticReward(str(tmp_path / "linear.pth"), sha256(tmp_path / "linear.pth"), str(tiny_clip), None)

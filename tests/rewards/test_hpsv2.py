"""HPS v2.1 against plain open_clip, and its preprocessing against the released scorer's."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torchvision.transforms.functional as vision
from PIL import Image
from reward_models import TINY_OPEN_CLIP, pil, sha256, smooth_images, tiny_open_clip
from torchvision.transforms import InterpolationMode

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.hpsv2 import HpsV2Reward

PROMPTS = ["a cat", "two dogs on a red sofa", "a cat"]


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[open_clip.CLIP, Path]:
    """A model and its checkpoint in the released format: fp16 in `state_dict`, beside training state."""
    folder = tmp_path_factory.mktemp("hpsv2")
    model = tiny_open_clip(folder)
    halves = {name: value.half() for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "hps", "state_dict": halves}, folder / "weights.pt")
    model.load_state_dict(halves)
    return model, folder / "weights.pt"


@pytest.fixture(autouse=True)
def converted_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdpo_ray.rewards.weights.CONVERTED_DIR", tmp_path / "converted")


def as_released(image: Image.Image) -> torch.Tensor:
    """The released scorer's preprocessing with torchvision: to float, longest side to 32, zero padding, normalise."""
    pixels = vision.to_tensor(image)
    height, width = (round(side * (32 / max(image.size))) for side in pixels.shape[1:])
    pixels = vision.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    left, top = (32 - width) // 2, (32 - height) // 2
    pixels = vision.pad(pixels, [left, top, 32 - width - left, 32 - height - top], fill=0)
    return vision.normalize(pixels, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (50, 81), (97, 40), (32, 20), (20, 28)])
def test_scores_equal_the_cosines_of_open_clip(released: tuple[open_clip.CLIP, Path], height: int, width: int) -> None:
    model, path = released
    reward = HpsV2Reward(TINY_OPEN_CLIP, str(path), None, sha256(path))
    images = smooth_images(3, height, width)
    pixels = torch.stack([as_released(pil(image)) for image in images])
    torch.testing.assert_close(reward.preprocess(images), pixels, rtol=0, atol=1e-5)
    with torch.no_grad():
        logits, _ = model.get_logits(pixels, open_clip.get_tokenizer(TINY_OPEN_CLIP)(PROMPTS))
    expected = logits.diagonal() / model.logit_scale.exp()
    scores = reward(images, PROMPTS)
    np.testing.assert_allclose(scores, expected.detach().numpy(), rtol=0, atol=1e-6)
    assert scores.dtype == np.float64


def test_a_very_narrow_image_keeps_a_line(released: tuple[open_clip.CLIP, Path]) -> None:
    _, path = released
    pixels = HpsV2Reward(TINY_OPEN_CLIP, str(path), None, sha256(path)).preprocess(smooth_images(1, 200, 3) + 1)
    black = -torch.tensor(open_clip.OPENAI_DATASET_MEAN) / torch.tensor(open_clip.OPENAI_DATASET_STD)
    is_black = (pixels - black[:, None, None]).abs().amax(dim=(0, 1, 2)) < 1e-5
    assert is_black.sum() == 31 and not is_black[15]


def test_a_checkpoint_of_another_model_is_refused(released: tuple[open_clip.CLIP, Path], tmp_path: Path) -> None:
    torch.save({"state_dict": {"something": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(
        RewardError,
        match=rf"`rewards\.hpsv2\.checkpoint` .*/other\.pt: does not fit {TINY_OPEN_CLIP}: .*something",
    ):
        HpsV2Reward(TINY_OPEN_CLIP, str(tmp_path / "other.pt"), None, sha256(tmp_path / "other.pt"))


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(
        RewardError, match=r"`rewards\.hpsv2\.architecture` must be an architecture of open_clip, got 'ViT-X'"
    ):
        HpsV2Reward("ViT-X", "weights.pt", None, "0" * 64)

"""JPEG size beyond that of a black image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cdpo_ray.rewards.jpeg_size import JpegSizeReward


def noise(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def size(image: np.ndarray, quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return len(buffer.getvalue())


@pytest.mark.parametrize(("height", "width"), [(32, 32), (8, 200)])
def test_a_black_image_scores_zero_exactly(height: int, width: int) -> None:
    assert JpegSizeReward()(torch.zeros(2, 3, height, width, dtype=torch.uint8), ["x", "y"]).tolist() == [0.0, 0.0]


def test_noise_scores_above_a_gradient_and_a_gradient_above_a_flat_colour() -> None:
    gradient = torch.arange(32, dtype=torch.uint8).mul(8).expand(1, 3, 32, 32)
    flat = torch.full((1, 3, 32, 32), 200, dtype=torch.uint8)
    scores = JpegSizeReward()(torch.cat([noise(), gradient, flat]), ["x"] * 3)
    assert scores[0] > scores[1] > scores[2] >= 0


@pytest.mark.parametrize("quality", [10, 90])
def test_the_score_is_the_size_by_pil_beyond_that_of_a_black_image(quality: int) -> None:
    image = noise(24, 40)
    expected = size(image[0].permute(1, 2, 0).numpy(), quality) - size(np.zeros((24, 40, 3), np.uint8), quality)
    assert JpegSizeReward(quality)(image, ["x"]).tolist() == [expected / 1000]

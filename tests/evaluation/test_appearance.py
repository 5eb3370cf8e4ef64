"""Measures of appearance, on images with known values."""

import colorsys

import numpy as np
import pytest
import torch

from cdpo_ray.evaluation.appearance import EDGE_THRESHOLD, edge_density, jpeg_kilobytes, saturation
from cdpo_ray.rewards.jpeg_size import JpegSizeReward


def random_images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(3, 3, 7, 9), dtype=np.uint8)


def flat_image(colour: tuple[int, int, int]) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8)[:, None, None], (3, 8, 8)).copy()


def test_saturation_is_the_mean_saturation_of_hsv() -> None:
    images = random_images()
    images[0, :, :3] = 0  # black has no saturation
    expected = [np.mean([colorsys.rgb_to_hsv(*pixel / 255)[1] for pixel in image.reshape(3, -1).T]) for image in images]
    np.testing.assert_allclose(saturation(images), expected, rtol=1e-6)


def test_grey_has_saturation_0_and_pure_colours_have_1() -> None:
    images = np.stack([flat_image((90, 90, 90)), flat_image((0, 0, 255)), flat_image((200, 100, 150))])
    np.testing.assert_allclose(saturation(images), [0, 1, 0.5])


@pytest.mark.parametrize("turned", [False, True])
def test_a_straight_step_is_an_edge_of_two_pixels_in_both_directions(turned: bool) -> None:
    image = np.zeros((3, 12, 10), np.uint8)
    image[:, :, 5:] = 255
    found = edge_density((image.transpose(0, 2, 1) if turned else image)[None])
    assert found == pytest.approx([2 / 8])  # columns 4 and 5 of the inner 8


@pytest.mark.parametrize("above", [False, True])
def test_a_step_counts_if_its_luma_exceeds_the_threshold(above: bool) -> None:
    image = np.zeros((1, 3, 8, 8), np.uint8)
    image[:, :, :, 4:] = int(255 * EDGE_THRESHOLD) + above
    assert (edge_density(image) > 0).all() == above


def test_edges_equal_a_convolution_with_sobels_kernels() -> None:
    images = random_images(1) // 3
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
    luma = torch.einsum("c,ichw->ihw", torch.tensor([0.299, 0.587, 0.114]), torch.from_numpy(images).float() / 255)
    across, down = torch.nn.functional.conv2d(luma[:, None], torch.stack([kernel, kernel.T])[:, None]).unbind(1)
    expected = (torch.hypot(across, down) > EDGE_THRESHOLD).float().mean(dim=(1, 2))
    np.testing.assert_allclose(edge_density(images), expected, atol=1e-6)


def test_compressed_size_equals_the_jpeg_size_reward() -> None:
    images = random_images(2)
    assert jpeg_kilobytes(images).tolist() == JpegSizeReward(90)(torch.from_numpy(images), ["", "", ""]).tolist()

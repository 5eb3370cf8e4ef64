"""Images -> measures of their appearance, independent of any judge."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from cdpo_ray.rewards.jpeg_size import JpegSizeReward

Images = NDArray[np.uint8]
Values = NDArray[np.floating]

LUMA = (0.299, 0.587, 0.114)
EDGE_THRESHOLD = 0.1  # share of the step from black to white: contours exceed it, sensor noise does not


def saturation(images: Images) -> Values:
    """Mean over pixels of ``(max - min) / max`` of the three channels: 0 (grey) to 1 (pure colours); black is 0.

    Args:
        images: uint8 ``[image, 3, height, width]``.

    Returns:
        ``[image]``.

    Source: A. R. Smith, "Color gamut transform pairs", SIGGRAPH 1978.
    """
    largest = images.max(axis=1).astype(np.float32)
    spread = largest - images.min(axis=1)
    share = np.divide(spread, largest, out=np.zeros_like(largest), where=largest > 0)
    return share.mean(axis=(1, 2), dtype=np.float64)


def edge_density(images: Images) -> Values:
    """Share of inner pixels whose Sobel gradient of luma exceeds `EDGE_THRESHOLD`, 0 to 1.

    The gradient is scaled so that a straight step from black to white has a gradient of 1.

    Args:
        images: uint8 ``[image, 3, height, width]``, at least 3 x 3 pixels.

    Returns:
        ``[image]``.

    Source: the operator of I. Sobel and G. Feldman (1968); luma of ITU-R BT.601.
    """
    luma = images.transpose(0, 2, 3, 1) @ (np.array(LUMA, np.float32) / 255)
    across = luma[:, :, 2:] - luma[:, :, :-2]
    down = luma[:, 2:] - luma[:, :-2]
    horizontal = (across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]) / 4
    vertical = (down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]) / 4
    return (np.hypot(horizontal, vertical) > EDGE_THRESHOLD).mean(axis=(1, 2))


def jpeg_kilobytes(images: Images) -> Values:
    """Size of each image as a JPEG of quality 90 in kilobytes, ``[image]``; see `JpegSizeReward`."""
    return JpegSizeReward()(torch.from_numpy(images), [""] * len(images))


APPEARANCE: dict[str, Callable[[Images], Values]] = {
    "saturation": saturation,
    "edge_density": edge_density,
    "jpeg_kilobytes": jpeg_kilobytes,
}
"""Column name -> function that returns one value per image."""

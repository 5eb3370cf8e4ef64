"""Images -> inputs of a vision model, in one batch on the device."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def centre_crop(images: Tensor, size: int, *, mode: str = "bicubic") -> Tensor:
    """Resize the shorter side and crop the centre.

    Matches torchvision's and PIL's ``Resize`` and ``CenterCrop`` up to 8-bit rounding.

    Args:
        images: uint8 ``[image, 3, height, width]``.
        size: of the output, in pixels.
        mode: interpolation, ``bicubic`` or ``bilinear``.

    Returns:
        fp32 ``[image, 3, size, size]``, 0 to 1.
    """
    pixels = images.float() / 255
    height, width = pixels.shape[-2:]
    resized = [size * side // min(height, width) for side in (height, width)]
    pixels = _resized(pixels, resized, mode)
    top, left = (round((side - size) / 2) for side in resized)  # torchvision rounds halves to even, too
    return pixels[..., top : top + size, left : left + size]


def squash(images: Tensor, size: int, *, mode: str = "bicubic") -> Tensor:
    """Resize both sides, without regard to the aspect ratio; same arguments and result as `centre_crop`."""
    return _resized(images.float() / 255, [size, size], mode)


def letterbox(images: Tensor, size: int) -> Tensor:
    """Resize the longer side (bicubic) and pad with black on both sides.

    Values exceed the range 0 to 1 slightly at sharp edges, as in models trained on images resized as floats.

    Args:
        images: uint8 ``[image, 3, height, width]``.
        size: of the output, in pixels.

    Returns:
        fp32 ``[image, 3, size, size]``.
    """
    pixels = images.float() / 255
    longest = max(pixels.shape[-2:])
    height, width = (max(1, round(side * size / longest)) for side in pixels.shape[-2:])
    if longest != size:
        pixels = F.interpolate(pixels, size=[height, width], mode="bicubic", antialias=True, align_corners=False)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(pixels, (left, size - width - left, top, size - height - top))


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pixels ``[image, 3, height, width]``, minus the mean and divided by the standard deviation of each channel."""
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def _resized(pixels: Tensor, size: list[int], mode: str) -> Tensor:
    if list(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)

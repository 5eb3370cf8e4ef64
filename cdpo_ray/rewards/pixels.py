"""Images -> what a vision net takes, in one batch on the device."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def centre_crop(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side (bicubic), crop the centre: uint8 ``[image, 3, height, width]`` -> fp32 0 to 1, square.

    Agrees with torchvision's and PIL's ``Resize``, ``CenterCrop`` to within the rounding of 8 bits.
    """
    pixels = images.float() / 255
    height, width = pixels.shape[-2:]
    if (height, width) == (size, size):
        return pixels
    resized = [size * side // min(height, width) for side in (height, width)]
    pixels = F.interpolate(pixels, size=resized, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (round((side - size) / 2) for side in resized)  # the halves as torchvision rounds them
    return pixels[..., top : top + size, left : left + size]


def letterbox(images: Tensor, size: int) -> Tensor:
    """Resize the longer side (bicubic), pad with black on both sides: uint8 -> fp32 ``[image, 3, size, size]``.

    Values pass 0 to 1 by a little at sharp edges, as they do where a net was trained on images resized as floats.
    """
    pixels = images.float() / 255
    longest = max(pixels.shape[-2:])
    height, width = (max(1, round(side * size / longest)) for side in pixels.shape[-2:])
    if longest != size:
        pixels = F.interpolate(pixels, size=[height, width], mode="bicubic", antialias=True, align_corners=False)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(pixels, (left, size - width - left, top, size - height - top))


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Each channel minus its mean, over its standard deviation."""
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]

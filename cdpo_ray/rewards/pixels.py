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


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Each channel minus its mean, over its standard deviation."""
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]

"""Images -> compressed size: a reward without a model, easy to exploit."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class JpegSizeReward:
    """Size of the image as JPEG in kilobytes, minus that of a black image of the same size (mostly header).

    Args:
        quality: JPEG quality, 1 to 100.

    Source: arXiv:2305.13301 (incompressibility reward).
    """

    def __init__(self, quality: int = 90) -> None:
        self.quality = quality

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        pixels = images.cpu().numpy().transpose(0, 2, 3, 1)
        blank = self._num_bytes(np.zeros_like(pixels[0]))
        return np.array([(self._num_bytes(image) - blank) / 1000 for image in pixels])

    def _num_bytes(self, image: NDArray[Any]) -> int:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="jpeg", quality=self.quality)
        return buffer.tell()

"""Images -> compressed size: a reward that needs no model, and that is easily hacked."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


class JpegSizeReward:
    """Kilobytes of the image as JPEG, beyond those of a blank image of the same size (which are all header).

    Source: the incompressibility reward of arXiv:2305.13301.
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

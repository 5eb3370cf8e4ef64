"""Pixels <-> PNG."""

import io
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from cdpo_ray.records import PIXEL_COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

PNGS = pa.list_(pa.binary())


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """One image, uint8 ``[3, height, width]``, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format="png")
    return buffer.getvalue()


def encode_pixels(rows: pa.Table) -> pa.Table:
    """Replace each column of raw pixels by a column of PNGs, ``list<binary>``, at the same position of the table.

    Each row is a chunk of its own: offsets of one Arrow array of binary values end at 2 GiB.
    """
    for pixels, images in PIXEL_COLUMNS.items():
        if pixels in rows.column_names:
            encoded = [
                pa.array([[encode_png(image) for image in row]], PNGS)
                for chunk in rows[pixels].chunks
                for row in chunk.to_numpy_ndarray()
            ]
            rows = rows.set_column(rows.column_names.index(pixels), images, pa.chunked_array(encoded, PNGS))
    return rows


def decode_png(data: bytes) -> NDArray[np.uint8]:
    """PNG -> uint8 ``[3, height, width]``."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def pairwise_rms_distance(images: NDArray[np.uint8]) -> float:
    """Diversity of one prompt's images: root-mean-square pixel difference of two, averaged over all pairs, 0 to 1.

    Distances come from the Gram matrix, so memory is that of the images.

    Args:
        images: uint8 ``[image, 3, height, width]``, at least two.

    Raises:
        ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"pairwise_rms_distance: needs at least 2 images, got {len(images)}")
    flat = images.reshape(len(images), -1) / 255.0
    gram = flat @ flat.T
    squares = np.diag(gram)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * gram, 0) / flat.shape[1])
    return float(distances[np.triu_indices(len(images), k=1)].mean())


def is_black(images: "Tensor") -> NDArray[np.bool_]:
    """Which images, ``[image, 3, height, width]``, are 0 everywhere: such an image has no score.

    It is what a safety checker leaves, and what `TextToImageModel.decode` makes of values that are not finite.
    """
    black: NDArray[np.bool_] = (images.flatten(1).amax(dim=1) == 0).cpu().numpy()
    return black

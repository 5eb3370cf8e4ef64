"""Pixels <-> PNG."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from cdpo_ray.errors import StoreError, printable
from cdpo_ray.records import PIXEL_COLUMNS

if TYPE_CHECKING:
    from torch import Tensor

PNGS = pa.list_(pa.binary())
MAX_PNG_BYTES, MAX_PNG_PIXELS = 2**28, 2**26
"""Of an image that a run kept: 8192 x 8192 pixels."""


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


def open_png(data: bytes, where: str) -> Image.Image:
    """Read an image that a run kept, as RGB; it may be somebody else's, so nothing but PNG of a bounded size is read.

    Args:
        where: file and row, for the message.

    Raises:
        StoreError: it is no PNG, is damaged, or has more than `MAX_PNG_BYTES` or, by its header, `MAX_PNG_PIXELS`.
    """
    try:
        if not isinstance(data, bytes) or len(data) > MAX_PNG_BYTES:
            raise ValueError(f"must be bytes, at most {MAX_PNG_BYTES:,}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PNG_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PNG_PIXELS:,}")
                return image.convert("RGB")
    except Exception as error:  # Pillow reports damage by many kinds
        raise StoreError(
            f"{where}: is not a PNG that can be read ({printable(error)}); delete its folder and run `cdpo run CONFIG`"
            " to make it again"
        ) from None


def decode_png(data: bytes, where: str = "image") -> NDArray[np.uint8]:
    """PNG -> uint8 ``[3, height, width]``; arguments and errors as of `open_png`."""
    return np.asarray(open_png(data, where)).transpose(2, 0, 1)


def decode_pngs(pngs: Sequence[bytes], where: Sequence[str]) -> NDArray[np.uint8]:
    """PNGs of one size -> uint8 ``[image, 3, height, width]``.

    Args:
        where: of each, as of `open_png`.

    Raises:
        StoreError: one cannot be read, or has another size than the first.
    """
    images = [decode_png(png, place) for png, place in zip(pngs, where, strict=True)]
    for image, place in zip(images, where, strict=True):
        if image.shape != images[0].shape:
            raise StoreError(
                f"{place}: is {image.shape[2]} x {image.shape[1]} pixels, another image of the run is"
                f" {images[0].shape[2]} x {images[0].shape[1]}; the file was altered, do not use it"
            )
    return np.stack(images)


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

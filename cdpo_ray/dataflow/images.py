"""Pixels <-> PNG."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
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
"""Limits of an image that a run stored; the latter is 8192 x 8192 pixels."""
NO_IMAGES = "holds latents but no images; `generation.keep_images: true` keeps them, in a run with another `run.name`"
"""Message about samples whose run did not keep its images."""


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode one image, uint8 ``[3, height, width]``, as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(buffer, format="png")
    return buffer.getvalue()


def encode_pixels(rows: pa.Table) -> pa.Table:
    """Replace each column of raw pixels by a column of PNGs, ``list<binary>``, at the same position of the table.

    Each row becomes a separate chunk, because the offsets of one binary Arrow array end at 2 GiB.
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
    """Decode an image that a run stored, as RGB; it is untrusted, so only PNGs of a limited size are read.

    Args:
        data: content of the PNG.
        where: file and row, for the message.

    Raises:
        StoreError: the data are not a PNG, are damaged, or exceed `MAX_PNG_BYTES` or, by the header, `MAX_PNG_PIXELS`.
    """
    with _opened(data, where) as image:
        return image.convert("RGB")


def refuse_other_images(data: bytes, where: str) -> None:
    """Refuse an image that `open_png` would not decode, by its header.

    Raises:
        StoreError: see `open_png`.
    """
    with _opened(data, where):
        pass


@contextlib.contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image.Image]:
    try:
        if not isinstance(data, bytes) or len(data) > MAX_PNG_BYTES:
            raise ValueError(f"must be bytes, at most {MAX_PNG_BYTES:,}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                if image.width * image.height > MAX_PNG_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PNG_PIXELS:,}")
                yield image
    except Exception as error:  # Pillow reports damage by many exception types
        raise StoreError(
            f"{where}: is not a readable PNG ({printable(error)}); delete its folder and run `cdpo run CONFIG` to"
            " regenerate it"
        ) from None


def decode_png(data: bytes, where: str = "image") -> NDArray[np.uint8]:
    """Decode a PNG to uint8 ``[3, height, width]``; arguments and errors: see `open_png`."""
    return np.asarray(open_png(data, where)).transpose(2, 0, 1)


def decode_pngs(pngs: Sequence[bytes], where: Sequence[str]) -> NDArray[np.uint8]:
    """Decode PNGs of one size to uint8 ``[image, 3, height, width]``.

    Args:
        pngs: content of each PNG.
        where: file and row of each PNG, for the message.

    Raises:
        StoreError: a PNG cannot be read, or has another size than the first.
    """
    images = [decode_png(png, source) for png, source in zip(pngs, where, strict=True)]
    for image, source in zip(images, where, strict=True):
        if image.shape != images[0].shape:
            raise StoreError(
                f"{source}: is {image.shape[2]} x {image.shape[1]} pixels, another image of the run is"
                f" {images[0].shape[2]} x {images[0].shape[1]}; the file was altered, do not use it"
            )
    return np.stack(images)


def pairwise_rms_distance(images: NDArray[np.uint8]) -> float:
    """Diversity of one prompt's images: root-mean-square pixel difference, averaged over all pairs, 0 to 1.

    Distances are computed from the Gram matrix, so memory is proportional to the images.

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
    """Mask ``[image]`` of the images, ``[image, 3, height, width]``, that are 0 everywhere and so have no score.

    A safety checker blacks images out, and `TextToImageModel.decode` returns black for non-finite values.
    """
    black: NDArray[np.bool_] = (images.flatten(1).amax(dim=1) == 0).cpu().numpy()
    return black

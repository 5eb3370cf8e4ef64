"""Untrusted image file -> pixels of the training size, or the reason why it is unusable."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from cdpo_ray.store import refuse_special_file

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_ENLARGEMENT = 4  # an image that is enlarged more is mostly blur
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> transposition that turns the image upright."""
BITS_PER_SAMPLE = 258  # TIFF tag
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
PNG_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of PNG text chunks that may hold the orientation."""


@dataclass(frozen=True)
class Frame:
    """Training size of images, and limits on image files.

    Attributes:
        height, width: image size in training, in pixels.
        max_bytes: maximum size of a file.
        max_pixels: maximum number of pixels according to the header.
    """

    height: int
    width: int
    max_bytes: int
    max_pixels: int


def load_pixels(image: bytes | str, frame: Frame) -> tuple[NDArray[np.uint8], bool]:
    """Decode an image as `open_upright` does, scale it to cover the frame, and crop the centre.

    Args:
        image: bytes or path of a file.

    Returns:
        uint8 ``[3, height, width]``, and whether the image was cropped.

    Raises:
        ValueError: with the reason why the image is unusable.
    """

    def check(width: int, height: int) -> None:
        if frame.width > MAX_ENLARGEMENT * width or frame.height > MAX_ENLARGEMENT * height:
            raise ValueError(
                f"has {width} x {height} pixels; {frame.width} x {frame.height} would enlarge it more than"
                f" {MAX_ENLARGEMENT} times"
            )

    upright = open_upright(image, max_bytes=frame.max_bytes, max_pixels=frame.max_pixels, check_size=check)
    fitted = ImageOps.fit(upright, (frame.width, frame.height), Image.Resampling.BICUBIC)
    if not fitted.getbbox():
        raise ValueError("is all black, as after a safety checker")
    is_cut = upright.width * frame.height != upright.height * frame.width
    return np.asarray(fitted).transpose(2, 0, 1), is_cut


def open_upright(
    image: bytes | str,
    *,
    max_bytes: int,
    max_pixels: int,
    check_size: Callable[[int, int], None] = lambda width, height: None,
) -> Image.Image:
    """Decode an untrusted image, turn it upright, and convert it to RGB on white.

    The limits are compared with the file's size and header before decoding. Animations yield their first picture.

    Args:
        image: bytes or path of a file.
        max_bytes: maximum size of the file.
        max_pixels: maximum number of pixels according to the header.
        check_size: called with width and height by the header; may raise a `ValueError`.

    Raises:
        ValueError: with the reason why the image is unusable.
    """
    data = _without_metadata(_bytes(image, max_bytes))
    with _refusing_damage(max_pixels):
        opened = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    width, height = opened.size
    if width * height > max_pixels:
        raise ValueError(f"has {width} x {height} pixels, more than {max_pixels:,}")
    check_size(width, height)
    with _refusing_damage(max_pixels):
        opened.load()
        turn = _turn(opened)
    grey = _eight_bits(opened) if opened.mode == "F" or opened.mode.startswith("I") else opened
    with _refusing_damage(max_pixels):
        return _rgb(grey if turn is None else grey.transpose(turn))


@contextlib.contextmanager
def _refusing_damage(max_pixels: int) -> Iterator[None]:
    """Turn every error of Pillow about a file into a `ValueError` with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about the number of pixels, where our limit is stricter, and about metadata
            yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"must be one of {', '.join(IMAGE_FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"has more pixels than {max_pixels:,}: {error}") from None
    except Exception as error:
        raise ValueError(f"is damaged: {str(error) or type(error).__name__}") from None


def _without_metadata(data: bytes) -> bytes:
    """Remove colour profile and text chunks of a PNG, whose size Pillow limits; other files are not changed.

    Text chunks that may hold the orientation are kept.
    """
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, start = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])  # length, kind, content, checksum
        kind = data[start + 4 : start + 8]
        if kind != b"iCCP" and (kind not in PNG_TEXT or data.startswith(PNG_ORIENTATION, start + 8)):
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Transposition that turns an image upright; `None`: the metadata lack it or are unreadable.

    `ImageOps.exif_transpose` would write the metadata back and fail on values of a wrong type.
    """
    try:
        return UPRIGHT.get(int(image.getexif().get(ExifTags.Base.Orientation, 1)))
    except MemoryError:
        raise
    except Exception:  # Pillow may raise anything; viewers show an image with damaged metadata unrotated
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits to 8 bits; Pillow would clip it.

    Raises:
        ValueError: if white cannot be derived from the range of the values.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        white = 2 ** getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif not (low >= 0 and high <= 65535):
        raise ValueError(f"has mode {image.mode} with values of {low:g} to {high:g}; save it with 8 or 16 bits")
    else:
        whites = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next(white for white in whites if high <= white)
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _bytes(image: bytes | str, max_bytes: int) -> bytes:
    try:
        if isinstance(image, str):
            refuse_special_file(Path(image))
        size = len(image) if isinstance(image, bytes) else Path(image).stat().st_size
        if size == 0:
            raise ValueError("is empty")
        if size > max_bytes:
            raise ValueError(f"has {size:,} bytes, more than {max_bytes:,}")
        return image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; transparent pixels become white."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image.convert("RGB")

"""Bytes of an image that somebody has -> pixels of the size that is trained at, or why not."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_ENLARGEMENT = 4  # what is enlarged by more holds little but blur


@dataclass(frozen=True)
class Frame:
    """What images are made to fit, and what is not even opened.

    Attributes:
        height, width: pixels of what is trained at.
        max_bytes, max_pixels: of a file, and of what its header says it holds.
    """

    height: int
    width: int
    max_bytes: int
    max_pixels: int


def load_pixels(image: bytes | str, frame: Frame) -> tuple[NDArray[np.uint8], bool]:
    """Decode, turn upright, convert to RGB on white, scale to cover the frame and cut what juts out, evenly.

    Caps are compared with the file's size and its header, before anything is decoded. Of an animation the first picture
    is taken.

    Args:
        image: bytes, or the path of a file.

    Returns:
        uint8 ``[3, height, width]``, and whether anything was cut.

    Raises:
        ValueError: with the reason why the image cannot be used.
    """
    data = _bytes(image, frame.max_bytes)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the cap below is ours, and stricter
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = opened.size
        if width * height > frame.max_pixels:
            raise ValueError(f"has {width} x {height} pixels, more than {frame.max_pixels:,}")
        if max(frame.width / width, frame.height / height) > MAX_ENLARGEMENT:
            raise ValueError(
                f"has {width} x {height} pixels; {frame.width} x {frame.height} would enlarge it more than"
                f" {MAX_ENLARGEMENT} times"
            )
        upright = _rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        raise ValueError(f"is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"has more pixels than {frame.max_pixels:,}: {error}") from None
    except (OSError, SyntaxError) as error:  # Pillow speaks of a damaged file in both
        raise ValueError(f"is damaged: {error}") from None
    fitted = ImageOps.fit(upright, (frame.width, frame.height), Image.Resampling.BICUBIC)
    is_cut = upright.width * frame.height != upright.height * frame.width
    return np.asarray(fitted).transpose(2, 0, 1), is_cut


def _bytes(image: bytes | str, max_bytes: int) -> bytes:
    try:
        size = len(image) if isinstance(image, bytes) else Path(image).stat().st_size
        if size == 0:
            raise ValueError("is empty")
        if size > max_bytes:
            raise ValueError(f"has {size:,} bytes, more than {max_bytes:,}")
        return image if isinstance(image, bytes) else Path(image).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Eight bits of red, green and blue; what is transparent becomes white."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip, not scale
        return Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image.convert("RGB")

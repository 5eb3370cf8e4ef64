"""Images that people have: converted to what is trained at, or refused with the reason; numbered by fault 22."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preference_sets import encoded

from cdpo_ray.preferences.images import Frame, load_pixels

FRAME = Frame(32, 32, max_bytes=10_000_000, max_pixels=50_000_000)
HALVES = np.zeros((3, 32, 32), np.uint8)
HALVES[:, :, 16:] = (np.array([200, 100, 50], np.uint8))[:, None, None]


def saved(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture() -> Image.Image:
    return Image.fromarray(HALVES.transpose(1, 2, 0))


def header_of(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


def test_an_image_of_the_right_size_is_kept_to_the_bit() -> None:
    pixels, is_cut = load_pixels(encoded(HALVES), FRAME)
    np.testing.assert_array_equal(pixels, HALVES)
    assert not is_cut


def test_a_path_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(encoded(HALVES))
    np.testing.assert_array_equal(load_pixels(str(tmp_path / "image.png"), FRAME)[0], HALVES)


def test_what_juts_out_is_cut_evenly_and_said() -> None:
    wide = np.zeros((3, 64, 128), np.uint8)
    wide[:, :, 32:96] = 255  # the middle half, which is what a square keeps
    pixels, is_cut = load_pixels(encoded(wide), FRAME)
    assert is_cut
    assert (pixels[:, :, 1:-1] == 255).all()  # at the cut, the filter sees a little of what was cut


def test_fault_22_palette_grey_and_transparent_images_become_rgb_on_white() -> None:
    np.testing.assert_allclose(
        load_pixels(saved(picture().convert("P", palette=Image.Palette.ADAPTIVE)), FRAME)[0], HALVES, atol=2
    )
    grey = picture().convert("L")
    np.testing.assert_array_equal(load_pixels(saved(grey), FRAME)[0], np.stack([np.asarray(grey)] * 3))
    for mode in ("LA", "RGBA"):
        clear = picture().convert(mode)
        clear.putalpha(Image.fromarray(np.where(HALVES[0] > 0, 255, 0).astype(np.uint8)))
        pixels, _ = load_pixels(saved(clear), FRAME)
        assert (pixels[:, :, :16] == 255).all()
        np.testing.assert_array_equal(
            pixels[:, :, 16:], np.asarray(picture().convert(mode[:-1]).convert("RGB")).transpose(2, 0, 1)[:, :, 16:]
        )


def test_fault_22_cmyk_becomes_rgb() -> None:
    pixels, _ = load_pixels(saved(picture().convert("CMYK"), "tiff"), FRAME)
    np.testing.assert_allclose(pixels, HALVES, atol=1)


def test_fault_22_sixteen_bits_of_grey_are_scaled_not_clipped() -> None:
    deep = (np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64).astype(np.uint16)
    pixels, _ = load_pixels(saved(Image.fromarray(deep)), FRAME)
    np.testing.assert_array_equal(pixels[0], np.round(deep / 257).astype(np.uint8))


def test_fault_22_a_rotated_photograph_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = picture().rotate(90, expand=True)
    pixels, _ = load_pixels(saved(turned, exif=exif), FRAME)
    np.testing.assert_array_equal(pixels, HALVES)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"^is empty$"),
        (b"no image, whatever its name says", r"^is none of PNG, JPEG, WEBP, BMP, TIFF, GIF$"),
        (encoded(np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8))[:3000], r"^is damaged: "),
        (encoded(np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8), "jpeg")[:2000], r"^is damaged: "),
        (encoded(np.zeros((3, 1, 1), np.uint8)), r"^has 1 x 1 pixels; 32 x 32 would enlarge it more than 4 times$"),
        (header_of(10_000, 10_000), r"^has 10000 x 10000 pixels, more than 50,000,000$"),
        (header_of(100_000, 100_000), r"^has more pixels than 50,000,000"),
        (b"\x89PNG" + bytes(10_000_000), r"^has 10,000,004 bytes, more than 10,000,000$"),
    ],
)
def test_fault_22_what_cannot_be_used_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_pixels(data, FRAME)


def test_fault_22_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^cannot be read: No such file"):
        load_pixels("/nowhere/image.png", FRAME)

"""Untrusted images are converted to the training size, or refused with the reason."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
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
    """A PNG header with this size and almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )


def test_an_image_of_the_right_size_is_not_changed() -> None:
    pixels, is_cut = load_pixels(encoded(HALVES), FRAME)
    np.testing.assert_array_equal(pixels, HALVES)
    assert not is_cut


def test_a_path_and_its_bytes_give_the_same(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(encoded(HALVES))
    np.testing.assert_array_equal(load_pixels(str(tmp_path / "image.png"), FRAME)[0], HALVES)


def test_a_wide_image_is_cropped_to_its_centre_and_reported_as_cropped() -> None:
    wide = np.zeros((3, 64, 128), np.uint8)
    wide[:, :, 32:96] = 255  # the middle half, which a square crop keeps
    pixels, is_cut = load_pixels(encoded(wide), FRAME)
    assert is_cut
    assert (pixels[:, :, 1:-1] == 255).all()  # at the edges, the filter mixes in cropped pixels


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


def test_fault_22_a_rotated_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    turned = picture().rotate(90, expand=True)
    pixels, _ = load_pixels(saved(turned, exif=exif), FRAME)
    np.testing.assert_array_equal(pixels, HALVES)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"^is empty$"),
        (b"not an image", r"^must be one of PNG, JPEG, WEBP, BMP, TIFF, GIF$"),
        (encoded(np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8))[:3000], r"^is damaged: "),
        (encoded(np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8), "jpeg")[:2000], r"^is damaged: "),
        (encoded(np.zeros((3, 1, 1), np.uint8)), r"^has 1 x 1 pixels; 32 x 32 would enlarge it more than 4 times$"),
        (encoded(np.zeros((3, 32, 32), np.uint8)), r"^is all black, as after a safety checker$"),
        (header_of(0, 10), r"^(must be one of|is damaged|has 0 x 10 pixels)"),
        (header_of(10_000, 10_000), r"^has 10000 x 10000 pixels, more than 50,000,000$"),
        (header_of(100_000, 100_000), r"^has more pixels than 50,000,000"),
        (b"\x89PNG" + bytes(10_000_000), r"^has 10,000,004 bytes, more than 10,000,000$"),
    ],
)
def test_fault_22_an_unusable_image_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_pixels(data, FRAME)


def test_fault_22_a_missing_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^cannot be read: No such file"):
        load_pixels("/nowhere/image.png", FRAME)


def exif_of(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF block of tags, given as number, type, count and the four bytes of the value."""
    listed = b"".join(struct.pack("<HHI4s", *entry) for entry in sorted(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4)


SHORT, ASCII, LONG, RATIONAL, SIGNED, FLOAT = 3, 2, 4, 5, 9, 11
ORIENTATION, WIDTH, RESOLUTION = 0x0112, 0x0100, 0x011A


@pytest.mark.parametrize(
    "wrong",
    [
        (RESOLUTION, ASCII, 3, b"72\0\0"),
        (WIDTH, FLOAT, 1, struct.pack("<f", 1.5)),
        (WIDTH, SIGNED, 1, struct.pack("<i", -1)),
        (RESOLUTION, RATIONAL, 1, struct.pack("<I", 10**6)),  # the value is beyond the end
        (RESOLUTION, 99, 1, bytes(4)),
    ],
)
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_fault_38_an_image_with_exif_values_of_a_wrong_type_is_turned_upright(
    wrong: tuple[int, int, int, bytes], kind: str
) -> None:
    turned = picture().rotate(90, expand=True)
    exif = exif_of((ORIENTATION, SHORT, 1, struct.pack("<HH", 6, 0)), wrong)
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpeg" else {}
    pixels, _ = load_pixels(saved(turned, kind, exif=exif, **options), FRAME)
    np.testing.assert_allclose(pixels, HALVES, atol=60 if kind == "jpeg" else 0)


@pytest.mark.parametrize(
    ("orientation", "turns"),
    [
        ((SHORT, 1, struct.pack("<HH", 0, 0)), False),
        ((SHORT, 1, struct.pack("<HH", 9, 0)), False),
        ((SHORT, 0, bytes(4)), False),
        ((ASCII, 2, b"x\0\0\0"), False),
        ((ASCII, 2, b"6\0\0\0"), True),
        ((LONG, 1, struct.pack("<I", 6)), True),
    ],
)
def test_only_an_orientation_of_2_to_8_turns_the_image(orientation: tuple[int, int, bytes], turns: bool) -> None:
    turned = picture().rotate(90, expand=True)
    pixels, _ = load_pixels(saved(turned, exif=exif_of((ORIENTATION, *orientation))), FRAME)
    np.testing.assert_array_equal(pixels, HALVES if turns else np.asarray(turned).transpose(2, 0, 1))


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_unreadable_exif_leaves_the_image_unchanged(exif: bytes) -> None:
    pixels, _ = load_pixels(saved(picture(), exif=exif), FRAME)
    np.testing.assert_array_equal(pixels, HALVES)


XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def test_an_orientation_in_xmp_or_png_text_turns_the_image() -> None:
    turned, info = picture().rotate(90, expand=True), PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP)
    np.testing.assert_array_equal(load_pixels(saved(turned, pnginfo=info), FRAME)[0], HALVES)
    exif, info = exif_of((ORIENTATION, SHORT, 1, struct.pack("<HH", 6, 0))), PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=True)
    np.testing.assert_array_equal(load_pixels(saved(turned, pnginfo=info), FRAME)[0], HALVES)
    assert (load_pixels(saved(turned, "webp", lossless=True, xmp=XMP.encode()), FRAME)[0] == HALVES).all()


@pytest.mark.parametrize("where", ["profile", "text", "compressed", "international", "many"])
def test_fault_38_a_png_with_megabytes_of_metadata_is_read(where: str) -> None:
    info, options = PngImagePlugin.PngInfo(), {}
    text = "a workflow of many nodes " * 60_000  # 1.5 MB
    if where == "profile":
        options["icc_profile"] = np.random.default_rng(0).bytes(1_200_000)
    elif where == "international":
        info.add_itxt("workflow", text, zip=True)
    else:
        for number in range(50 if where == "many" else 1):
            info.add_text(f"workflow {number}", text, zip=where != "text")
    info.add_itxt("XML:com.adobe.xmp", XMP)
    turned = picture().rotate(90, expand=True)
    pixels, _ = load_pixels(saved(turned, pnginfo=info, **options), FRAME)
    np.testing.assert_array_equal(pixels, HALVES)


def test_a_png_truncated_in_its_metadata_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "a" * 10_000)
    with pytest.raises(ValueError, match=r"^(is damaged|must be one of)"):
        load_pixels(saved(picture(), pnginfo=info)[:5000], FRAME)


@pytest.mark.parametrize(
    ("values", "white"),
    [
        (np.linspace(0, 1, 1024, dtype=np.float32), 1),
        (np.linspace(0, 255, 1024, dtype=np.float32), 255),
        (np.linspace(0, 65535, 1024, dtype=np.float32), 65535),
        (np.linspace(0, 255, 1024).astype(np.int32), 255),
        (np.linspace(0, 65535, 1024).astype(np.int32), 65535),
        (np.linspace(0, 65535, 1024).astype(np.uint16), 65535),
        (np.linspace(0, 255, 1024).astype(np.uint16), 65535),  # a dark image: the type of 16 bits defines white
    ],
)
def test_fault_38_more_than_eight_bits_are_scaled_by_their_range(values: np.ndarray, white: int) -> None:
    pixels, _ = load_pixels(saved(Image.fromarray(values.reshape(32, 32)), "tiff"), FRAME)
    np.testing.assert_allclose(pixels[0], values.reshape(32, 32) * (255 / white), atol=0.51)


def test_big_endian_values_give_the_same_image() -> None:
    values = (np.arange(1024).reshape(32, 32) * 64).astype(">u2")
    big = saved(Image.frombytes("I;16B", (32, 32), values.tobytes()), "tiff")
    assert Image.open(io.BytesIO(big)).mode == "I;16B"
    np.testing.assert_array_equal(load_pixels(big, FRAME)[0][0], np.round(values / 257).astype(np.uint8))


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-1, 1, 1024, dtype=np.float32),
        np.linspace(0, 1e6, 1024, dtype=np.float32),
        np.full(1024, np.nan, np.float32),
        np.linspace(0, 2**31 - 1, 1024).astype(np.int32),
        np.linspace(-100, 100, 1024).astype(np.int32),
    ],
)
def test_fault_38_a_range_that_does_not_define_white_is_refused_with_the_mode(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^has mode [IF] with values of \S+ to \S+; save it with 8 or 16 bits$"):
        load_pixels(saved(Image.fromarray(values.reshape(32, 32)), "tiff"), FRAME)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("mpo", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (32, 32))], "quality": 100}),
        ("gif", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (32, 32))]}),
        ("webp", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (32, 32))], "lossless": True}),
        ("png", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (32, 32))]}),
        ("tiff", "RGBA", {}),
        ("bmp", "RGB", {}),
    ],
)
def test_the_first_picture_of_an_animation_is_used(kind: str, mode: str, options: dict[str, object]) -> None:
    pixels, _ = load_pixels(saved(picture().convert(mode), kind, **options), FRAME)
    np.testing.assert_allclose(pixels, HALVES, atol=60 if kind == "mpo" else 2)


def test_one_bit_is_black_and_white() -> None:
    halves = Image.fromarray(HALVES[0] > 0)
    pixels, _ = load_pixels(saved(halves, "tiff"), FRAME)
    np.testing.assert_array_equal(pixels, np.where(HALVES > 0, 255, 0)[[0, 0, 0]])


def test_fault_56_a_named_pipe_or_device_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "image.png")
    for path in (tmp_path / "image.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"^cannot be read: is a pipe, a device or a socket, not a regular file$"):
            load_pixels(str(path), FRAME)

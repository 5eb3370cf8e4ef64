"""Encoding and decoding of PNGs."""

import io
import struct
import warnings
import zlib
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.dataflow.images import decode_png, decode_pngs, encode_pixels, encode_png, pairwise_rms_distance
from cdpo_ray.errors import StoreError


@pytest.mark.parametrize(("height", "width"), [(1, 1), (32, 32), (7, 13), (64, 8)])
def test_pixels_survive_png_exactly(height: int, width: int) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (3, height, width), dtype=np.uint8)
    back = decode_png(encode_png(pixels))
    assert back.dtype == np.uint8
    assert np.array_equal(back, pixels)


def test_the_png_has_channels_in_the_order_red_green_blue() -> None:
    pixels = np.zeros((3, 2, 3), np.uint8)
    pixels[:, 0, 1] = (10, 20, 30)
    data = encode_png(pixels)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    with Image.open(io.BytesIO(data)) as image:
        assert (image.mode, image.size, image.getpixel((1, 0))) == ("RGB", (3, 2), (10, 20, 30))


def test_a_view_with_other_strides_is_encoded_correctly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8).transpose(2, 0, 1)[:, ::2]
    assert np.array_equal(decode_png(encode_png(pixels)), pixels)


def test_pixels_of_a_table_become_pngs_at_the_same_position_for_any_chunks() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 5, 4), dtype=np.uint8)
    rows = pa.table({"prompt_index": range(3), "pixels": tensor_column(pixels), "score": [0.1, 0.2, 0.3]})
    for first, table in ((0, rows), (0, pa.concat_tables([rows.slice(0, 1), rows.slice(1)])), (1, rows.slice(1))):
        found = encode_pixels(table)
        assert found.column_names == ["prompt_index", "images", "score"]
        assert found.schema.field("images").type == pa.list_(pa.binary())
        back = [[decode_png(png) for png in row] for row in found["images"].to_pylist()]
        assert np.array_equal(back, pixels[first:])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_pngs_of_other_modes_are_read_as_rgb(mode: str) -> None:
    image = Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    assert np.array_equal(decode_png(buffer.getvalue()), np.full((3, 3, 4), 255, np.uint8))


def encoded(kind: str, size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind)
    return buffer.getvalue()


def with_width(png: bytes, width: int) -> bytes:
    """The same file with another width in its header."""
    header = b"IHDR" + struct.pack(">I", width) + png[20:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded("EPS"), "cannot identify image file"),
        (encoded("JPEG"), "cannot identify image file"),
        (b"", "cannot identify image file"),
        (encoded("PNG")[:40], "."),
        (with_width(encoded("PNG"), 2**30), "pixels"),
        (with_width(encoded("PNG", (4, 8192)), 8193), "8193 x 8192 pixels, at most 67,108,864"),
        (None, "must be bytes"),
        ("text", "must be bytes"),
    ],
)
def test_fault_53_data_that_are_not_a_png_of_limited_size_are_refused_by_name(data: Any, message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(StoreError, match=rf"row 7: is not a readable PNG \(.*{message}.*\); delete") as caught:
            decode_png(data, "row 7")
    assert str(caught.value).isprintable()


def test_fault_53_images_of_two_sizes_are_refused_by_name() -> None:
    with pytest.raises(StoreError, match="second: is 5 x 3 pixels, another image of the run is 4 x 3"):
        decode_pngs([encoded("PNG"), encoded("PNG", (5, 3))], ["first", "second"])


def test_diversity_equals_brute_force_over_all_pairs() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(5, 3, 6, 4), dtype=np.uint8)
    pairs = combinations(images / 255.0, 2)
    expected = np.mean([np.sqrt(((one - other) ** 2).mean()) for one, other in pairs])
    assert pairwise_rms_distance(images) == pytest.approx(expected)


def test_equal_images_have_diversity_zero_and_black_against_white_one() -> None:
    black, white = np.zeros((3, 8, 8), np.uint8), np.full((3, 8, 8), 255, np.uint8)
    assert pairwise_rms_distance(np.stack([white, white, white])) == pytest.approx(0, abs=1e-6)
    assert pairwise_rms_distance(np.stack([black, white])) == pytest.approx(1)
    with pytest.raises(ValueError, match="needs at least 2 images, got 1"):
        pairwise_rms_distance(black[None])

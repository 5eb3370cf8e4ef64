"""Pixels and prompts -> rule-based checks of colour, shape, count and place of each object."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from cdpo_ray.testbed.scenes import (
    BACKGROUND_PALETTE,
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    PLACES,
    SHAPES,
    SIZE,
    parse_caption,
    signed_distance,
)

MAX_OBJECTS = 2
FOREGROUND_DISTANCE = 60.0  # RGB distance to the background, of 255 * sqrt(3) = 442
BACKGROUND_TOLERANCE = 60.0  # RGB distance of the border's median to the named background
BORDER = 2  # pixels
MIN_BLOB = 5  # pixels; smaller specks are not counted
MIN_COLOUR_SHARE = 0.5  # of a blob's pixels that must agree on its colour
MIN_OVERLAP = 0.6  # intersection over union with the best template
MIDDLE_REACH = 4.5  # pixels from the image's centre, along either axis
_GRID = 16
_CHUNK = 256  # images at a time, so that the data fits into the cache

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Seen:
    """The two largest blobs of each image; values are indices into ``COLOURS``, ``SHAPES``, ...; -1: none of them."""

    colour: Ints  # [image, MAX_OBJECTS]
    shape: Ints  # [image, MAX_OBJECTS]
    place: Ints  # [image, MAX_OBJECTS]
    count: Ints  # [image]
    background: Ints  # [image]


def judge(images: NDArray[np.uint8], prompts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Check each image against its prompt.

    Args:
        images: ``[image, 3, 32, 32]`` uint8 RGB.
        prompts: one caption of this world per image.

    Returns:
        ``[image]`` fp32 in [0, 1]. ``strict``: every check holds (each object's colour, shape and place, the count, the
        background where it is named). ``attr``: every check but the places holds. ``soft``: the share of the checks
        that hold.

    Raises:
        ValueError: shapes or dtype differ from the above, or a prompt does not follow the grammar.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"judge: `images` must be uint8 [image, 3, {SIZE}, {SIZE}], got {images.dtype} {images.shape}")
    if len(images) != len(prompts):
        raise ValueError(f"judge: needs one prompt per image, got {len(prompts)} prompts for {len(images)} images")
    chunks = [
        _judge_chunk(images[start : start + _CHUNK], prompts[start : start + _CHUNK])
        for start in range(0, len(images), _CHUNK)
    ]
    names = ("strict", "attr", "soft")
    return {name: np.concatenate([np.zeros(0, np.float32), *(chunk[name] for chunk in chunks)]) for name in names}


def _judge_chunk(images: NDArray[np.uint8], prompts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    seen = _look(images)
    objects, background = (np.array(wanted) for wanted in zip(*map(_wanted, prompts), strict=True))
    colour, shape, place = np.moveaxis(objects, 2, 0)  # each [image, MAX_OBJECTS]
    requested = colour >= 0

    blob = np.argmax(seen.colour[:, None] == colour[..., None], axis=2)  # the largest blob of the requested colour
    found = requested & (np.take_along_axis(seen.colour, blob, 1) == colour)
    shape_right = found & (np.take_along_axis(seen.shape, blob, 1) == shape)
    place_right = found & (np.take_along_axis(seen.place, blob, 1) == place)
    count_right = seen.count == requested.sum(1)
    background_requested = background >= 0
    background_right = background_requested & (seen.background == background)

    attr_held = found.sum(1) + shape_right.sum(1) + count_right + background_right
    attr_total = 2 * requested.sum(1) + 1 + background_requested
    held, total = attr_held + place_right.sum(1), attr_total + requested.sum(1)
    return {
        "strict": (held == total).astype(np.float32),
        "attr": (attr_held == attr_total).astype(np.float32),
        "soft": (held / total).astype(np.float32),
    }


@lru_cache(maxsize=1 << 14)
def _wanted(prompt: str) -> tuple[tuple[tuple[int, int, int], ...], int]:
    """Colour, shape and place of ``MAX_OBJECTS`` objects and the background, as indices; -1: not in the prompt."""
    scene = parse_caption(prompt)
    objects = [
        (COLOURS.index(item.colour), SHAPES.index(item.shape), PLACES.index(item.place)) for item in scene.objects
    ]
    objects += [(-1, -1, -1)] * (MAX_OBJECTS - len(objects))
    return tuple(objects), BACKGROUNDS.index(scene.background) if scene.background_named else -1


def _look(images: NDArray[np.uint8]) -> _Seen:
    pixels = images.astype(np.float32)
    ground = _border_median(pixels)  # [image, 3]
    labels = _label_blobs(_distance(pixels, ground[:, :, None, None]) > FOREGROUND_DISTANCE)
    num_images, num_labels = len(images), SIZE * SIZE + 1
    offset = num_labels * np.arange(num_images)[:, None]
    area = np.bincount((labels.reshape(num_images, -1) + offset).ravel(), minlength=num_images * num_labels)
    area = area.reshape(num_images, num_labels)
    area[:, 0] = 0  # label 0 is the background
    largest = np.argsort(-area, axis=1, kind="stable")[:, :MAX_OBJECTS]
    exists = np.take_along_axis(area, largest, 1) >= MIN_BLOB

    masks = labels[:, None] == largest[:, :, None, None]
    boxes = _boxes(masks)
    ground_distance = np.stack([_distance(ground, np.array(rgb)) for rgb in BACKGROUND_PALETTE.values()], 1)
    near_ground = ground_distance.min(1) < BACKGROUND_TOLERANCE
    return _Seen(
        colour=np.where(exists, _blob_colour(pixels, masks), -1),
        shape=np.where(exists, _blob_shape(masks, *boxes), -1),
        place=np.where(exists, _blob_place(*boxes), -1),
        count=(area >= MIN_BLOB).sum(1),
        background=np.where(near_ground, ground_distance.argmin(1), -1),
    )


def _distance(pixels: NDArray[np.float32], colour: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB distance along axis 1; ``colour`` broadcasts."""
    return np.sqrt(np.square(pixels - colour).sum(1))


def _border_median(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    ring = np.ones((SIZE, SIZE), bool)
    ring[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median(pixels[:, :, ring], axis=2)


def _label_blobs(foreground: Bools) -> NDArray[np.int16]:
    """Label the pixels of each 4-connected blob with the largest pixel number in it; 0 is background.

    Each pass propagates labels along all lines of both axes, in both directions, until nothing changes.
    """
    labels = np.where(foreground, np.arange(1, SIZE * SIZE + 1, dtype=np.int16).reshape(SIZE, SIZE), np.int16(0))
    while True:
        before = labels.copy()
        for axis in (1, 2):
            lines = np.moveaxis(labels, axis, 0)
            solid = np.moveaxis(foreground, axis, 0)
            for order in (range(1, SIZE), range(SIZE - 2, -1, -1)):
                step = 1 if order.step > 0 else -1
                for line in order:
                    lines[line] = np.maximum(lines[line], lines[line - step]) * solid[line]
        if np.array_equal(before, labels):
            return labels


def _blob_colour(pixels: NDArray[np.float32], masks: Bools) -> Ints:
    """The nearest palette colour of most pixels of each blob; -1: no clear majority."""
    distance = np.stack([np.square(pixels - np.array(rgb)[:, None, None]).sum(1) for rgb in PALETTE.values()], 1)
    nearest = distance.argmin(1)  # [image, y, x]
    votes = np.stack([(masks & (nearest == i)[:, None]).sum((2, 3)) for i in range(len(PALETTE))], 2)
    clear = votes.max(2) >= MIN_COLOUR_SHARE * votes.sum(2)
    return np.where(clear, votes.argmax(2), -1)


def _boxes(masks: Bools) -> tuple[Ints, Ints, Ints, Ints]:
    """Bounding boxes ``top, bottom, left, right`` in pixels, ends exclusive; each ``[image, blob]``."""
    rows, columns = np.asarray(masks.any(3)), np.asarray(masks.any(2))
    return (
        rows.argmax(2),
        SIZE - rows[..., ::-1].argmax(2),
        columns.argmax(2),
        SIZE - columns[..., ::-1].argmax(2),
    )


def _blob_shape(masks: Bools, top: Ints, bottom: Ints, left: Ints, right: Ints) -> Ints:
    """The shape whose template overlaps each blob best within its bounding box; -1: all below ``MIN_OVERLAP``."""
    position = (np.arange(_GRID) + 0.5) / _GRID
    row = (top[..., None] + (bottom - top)[..., None] * position).astype(np.int64)
    column = (left[..., None] + (right - left)[..., None] * position).astype(np.int64)
    image, blob = np.ogrid[: masks.shape[0], : masks.shape[1]]
    scaled = masks[image[..., None, None], blob[..., None, None], row[..., :, None], column[..., None, :]]
    templates = _templates()
    flat = scaled.reshape(*masks.shape[:2], -1).astype(np.float32)
    both = flat @ templates.T
    overlap = both / (flat.sum(2, keepdims=True) + templates.sum(1) - both)
    return np.where(overlap.max(2) >= MIN_OVERLAP, overlap.argmax(2), -1)


@cache
def _templates() -> NDArray[np.float32]:
    """``[shape, grid * grid]``: each shape fitted into its bounding box."""
    position = (np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID * 2 - 1
    y, x = np.meshgrid(position, position, indexing="ij")
    return np.stack([(signed_distance(shape, x, y, 1.0) <= 0).ravel() for shape in SHAPES]).astype(np.float32)


def _blob_place(top: Ints, bottom: Ints, left: Ints, right: Ints) -> Ints:
    """The side of the image on which the centre of each blob's box lies, or the middle."""
    x, y = (left + right - SIZE) / 2, (top + bottom - SIZE) / 2
    sideways = np.where(x < 0, PLACES.index("left"), PLACES.index("right"))
    upright = np.where(y < 0, PLACES.index("top"), PLACES.index("bottom"))
    side = np.where(np.abs(x) > np.abs(y), sideways, upright)
    return np.where(np.maximum(np.abs(x), np.abs(y)) <= MIDDLE_REACH, PLACES.index("middle"), side)

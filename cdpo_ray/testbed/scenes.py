"""Captioned 32x32 scenes: grammar, splits and renderer."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SIZE = 32
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (160, 50, 190),
    "cyan": (50, 200, 220),
}
BACKGROUND_PALETTE = {"white": (245, 245, 245), "gray": (128, 128, 128), "black": (15, 15, 15)}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = tuple(BACKGROUND_PALETTE)
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
PLACES = (*OPPOSITE, "middle")

HELDOUT_SHARE = 0.145
TWO_OBJECTS_SHARE = 0.8
BACKGROUND_NAMED_SHARE = 0.5

# Centres in pixels. Even the largest neighbours stay 2 pixels apart, so that the oracle can separate them.
_CENTRES = {"left": (8, 16), "right": (24, 16), "top": (16, 8), "bottom": (16, 24), "middle": (16, 16)}
_RADII = (4.4, 5.9)
_JITTER_ALONG = 1.0
_JITTER_ACROSS = 3.0

_OBJECT = r"a (\w+) (\w+) (?:on|in) the (\w+)"
_CAPTION = re.compile(rf"{_OBJECT}(?: and {_OBJECT})?(?:, on a (\w+) background)?")

Split = Literal["train", "heldout"]
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape and its place in the image."""

    colour: str
    shape: str
    place: str

    def __post_init__(self) -> None:
        for field, value, known in (
            ("colour", self.colour, COLOURS),
            ("shape", self.shape, SHAPES),
            ("place", self.place, PLACES),
        ):
            if value not in known:
                raise ValueError(f"SceneObject: `{field}` must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True)
class Scene:
    """One object in the middle, or two of different colours at opposite sides, on a plain background.

    The order of ``objects`` is the order in which the caption names them.
    """

    objects: tuple[SceneObject, ...]
    background: str
    background_named: bool

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"Scene: `background` must be one of {', '.join(BACKGROUNDS)}, got {self.background!r}")
        places = [item.place for item in self.objects]
        if len(places) == 1:
            if places != ["middle"]:
                raise ValueError(f"Scene: a single object must be in the middle, got {places[0]!r}")
        elif len(places) != 2 or OPPOSITE.get(places[0]) != places[1]:
            raise ValueError(f"Scene: two objects must be at opposite places, such as left and right, got {places}")
        elif self.objects[0].colour == self.objects[1].colour:
            raise ValueError(f"Scene: two objects must have different colours, got {self.objects[0].colour!r} twice")


def caption(scene: Scene) -> str:
    """Caption that names each object with its place, and the background if ``background_named``."""
    objects = " and ".join(
        f"a {item.colour} {item.shape} {'in' if item.place == 'middle' else 'on'} the {item.place}"
        for item in scene.objects
    )
    return f"{objects}, on a {scene.background} background" if scene.background_named else objects


def parse_caption(text: str) -> Scene:
    """The scene of a caption; without a named background, the first of ``BACKGROUNDS``.

    Raises:
        ValueError: ``text`` is not a caption of this grammar.
    """
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"parse_caption: not a caption of this world, got {text!r}; "
            "write it like 'a red circle on the left and a blue square on the right, on a white background'"
        )
    *words, background = match.groups()
    try:
        objects = tuple(SceneObject(*words[i : i + 3]) for i in (0, 3) if words[i] is not None)
        scene = Scene(objects, background or BACKGROUNDS[0], background is not None)
    except ValueError as error:
        raise ValueError(f"parse_caption: {error} in {text!r}") from None
    if caption(scene) != text:  # "on the middle", "in the left"
        raise ValueError(f"parse_caption: wrong preposition, got {text!r}; write {caption(scene)!r}")
    return scene


def signed_distance(
    shape: str, x: NDArray[np.floating], y: NDArray[np.floating], radius: float
) -> NDArray[np.floating]:
    """Signed distance to a shape's outline, negative inside.

    Args:
        shape: one of ``SHAPES``.
        x, y: offsets from the shape's centre, in the unit of ``radius``; ``y`` grows downwards.
        radius: half the side of the shape's bounding box.
    """
    across, down = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(across, down) - radius
    if shape == "triangle":
        return np.maximum(y - radius, (2 * across - y - radius) / np.sqrt(5))
    arm = radius / 3
    return np.minimum(
        np.maximum(across - radius, down - arm),
        np.maximum(across - arm, down - radius),
    )


def render(scene: Scene, rng: np.random.Generator) -> Image:
    """Draw a scene with random sizes and positions.

    Returns:
        ``[3, 32, 32]`` uint8 RGB with smooth edges.
    """
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    canvas = np.empty((3, SIZE, SIZE), np.float32)
    canvas[:] = np.array(BACKGROUND_PALETTE[scene.background])[:, None, None]
    for item in scene.objects:
        centre_x, centre_y = _CENTRES[item.place]
        jitter = rng.uniform(-1, 1, 2) * (_JITTER_ALONG, _JITTER_ACROSS)
        if item.place in ("top", "bottom"):
            jitter = jitter[::-1]
        distance = signed_distance(
            item.shape, x - centre_x - jitter[0], y - centre_y - jitter[1], float(rng.uniform(*_RADII))
        )
        cover = np.clip(0.5 - distance, 0, 1)
        canvas += cover * (np.array(PALETTE[item.colour])[:, None, None] - canvas)
    return np.rint(canvas).astype(np.uint8)


def is_heldout(scene: Scene) -> bool:
    """Whether the scene's pair of objects is held out from training, at any places."""
    if len(scene.objects) < 2:
        return False
    pair = "+".join(sorted(f"{item.colour} {item.shape}" for item in scene.objects))
    digest = hashlib.blake2b(pair.encode(), digest_size=8, person=b"testbed").digest()
    return int.from_bytes(digest, "big") / 2**64 < HELDOUT_SHARE


def sample_scene(rng: np.random.Generator, split: Split | None = "train") -> Scene:
    """A random scene of a split; `None` draws from both.

    Before scenes of the other split are rejected, 80 % of the draws have two objects, and half of the captions name the
    background.
    """
    while True:
        num_objects = 2 if rng.random() < TWO_OBJECTS_SHARE else 1
        colours = rng.permutation(len(COLOURS))[:num_objects]
        shapes = rng.integers(len(SHAPES), size=num_objects)
        first = PLACES[rng.integers(4)] if num_objects == 2 else "middle"
        places = (first, OPPOSITE[first]) if num_objects == 2 else (first,)
        scene = Scene(
            tuple(
                SceneObject(COLOURS[c], SHAPES[s], place) for c, s, place in zip(colours, shapes, places, strict=True)
            ),
            BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
            bool(rng.random() < BACKGROUND_NAMED_SHARE),
        )
        if split is None or is_heldout(scene) == (split == "heldout"):
            return scene


def all_scenes() -> Iterator[Scene]:
    """Every scene with a distinct caption, in a fixed order; unnamed backgrounds are the first of ``BACKGROUNDS``."""
    things = tuple(itertools.product(COLOURS, SHAPES))
    groups: list[tuple[SceneObject, ...]] = [(SceneObject(*thing, "middle"),) for thing in things]
    groups += [
        (SceneObject(*first, place), SceneObject(*second, OPPOSITE[place]))
        for first, second, place in itertools.product(things, things, OPPOSITE)
        if first[0] != second[0]
    ]
    for objects in groups:
        yield Scene(objects, BACKGROUNDS[0], False)
        for background in BACKGROUNDS:
            yield Scene(objects, background, True)


def scene_prompts(split: Split, count: int, seed: int) -> list[str]:
    """``count`` distinct captions of a split; for one seed, a shorter list is a prefix of a longer one.

    Raises:
        ValueError: the split is unknown or has fewer captions than ``count``.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"scene_prompts: `split` must be 'train' or 'heldout', got {split!r}")
    captions = [caption(scene) for scene in all_scenes() if is_heldout(scene) == (split == "heldout")]
    if not 0 <= count <= len(captions):
        raise ValueError(f"scene_prompts: {split!r} has {len(captions)} prompts, got `count` = {count}; ask for fewer")
    order = np.random.default_rng(seed).permutation(len(captions))[:count]
    return [captions[i] for i in order]


def scene_prompts_apart(apart_from: Sequence[str], count: int, seed: int) -> list[str]:
    """``count`` distinct captions of the held-out split that share no set of objects and places with ``apart_from``.

    They are taken from the end of the list whose beginning `scene_prompts` returns, so that the two seldom overlap.

    Raises:
        ValueError: the split has fewer such captions than ``count``.
    """
    shown = {_objects(text) for text in apart_from}
    everything = scene_prompts("heldout", sum(is_heldout(scene) for scene in all_scenes()), seed)
    captions = [text for text in reversed(everything) if _objects(text) not in shown]
    if len(captions) < count:
        raise ValueError(
            f"there are {len(captions)} prompts without a scene of the {len(apart_from)} held-out"
            f" ones, got `count` = {count}; lower it, or hold out fewer"
        )
    return captions[:count]


def _objects(text: str) -> frozenset[SceneObject]:
    """Objects of a caption in any order; empty if the text is not a caption of this world."""
    try:
        return frozenset(parse_caption(text).objects)
    except ValueError:
        return frozenset()

"""Scene -> the same scene with one error."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cdpo_ray.testbed.scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, is_heldout


def other_colour(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """One object takes a colour that is not in the scene."""
    index = int(rng.integers(len(scene.objects)))
    free = [colour for colour in COLOURS if colour not in {item.colour for item in scene.objects}]
    return _replace_object(scene, index, colour=str(rng.choice(free)))


def other_shape(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """One object takes another shape."""
    index = int(rng.integers(len(scene.objects)))
    free = [shape for shape in SHAPES if shape != scene.objects[index].shape]
    return _replace_object(scene, index, shape=str(rng.choice(free)))


def swapped_colours(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Two objects of different shapes exchange their colours."""
    if len(scene.objects) < 2 or scene.objects[0].shape == scene.objects[1].shape:
        return None
    first, second = scene.objects
    objects = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    return replace(scene, objects=objects)


def swapped_places(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Two objects exchange their places."""
    if len(scene.objects) < 2:
        return None
    first, second = scene.objects
    return replace(scene, objects=(replace(first, place=second.place), replace(second, place=first.place)))


def other_background(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """The caption names another background."""
    free = [background for background in BACKGROUNDS if background != scene.background]
    return replace(scene, background=str(rng.choice(free))) if scene.background_named else None


CONTRASTS: dict[str, Callable[[Scene, np.random.Generator], Scene | None]] = {
    "colour": other_colour,
    "shape": other_shape,
    "colours swapped": swapped_colours,
    "places swapped": swapped_places,
    "background": other_background,
}


def train_contrasts(scene: Scene, count: int, rng: np.random.Generator) -> list[Scene]:
    """``count`` random contrasts, none held out: training must not use held-out scenes even as wrong captions."""
    contrasts: list[Scene] = []
    makers = list(CONTRASTS.values())
    while len(contrasts) < count:
        wrong = makers[rng.integers(len(makers))](scene, rng)
        if wrong is not None and not is_heldout(wrong):
            contrasts.append(wrong)
    return contrasts


def _replace_object(scene: Scene, index: int, **changes: str) -> Scene:
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **changes)
    return replace(scene, objects=tuple(objects))

"""The oracle distinguishes correct images from wrong ones."""

import time
from dataclasses import replace

import numpy as np
import pytest

from cdpo_ray.testbed.oracle import judge
from cdpo_ray.testbed.scenes import Image, Scene, Split, caption, parse_caption, render, sample_scene

NUM_SCENES = 1000
PROMPT = "a red circle on the left and a blue square on the right, on a white background"


def renders(split: Split, seed: int = 0) -> tuple[list[Scene], np.ndarray]:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, split) for _ in range(NUM_SCENES)]
    return scenes, np.stack([render(scene, rng) for scene in scenes])


def picture(text: str) -> Image:
    return render(parse_caption(text), np.random.default_rng(0))


def verdict(image: Image, text: str = PROMPT) -> tuple[float, float, float]:
    scores = judge(image[None], [text])
    return float(scores["strict"][0]), float(scores["attr"][0]), float(scores["soft"][0])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_true_renders_pass_every_check(split: Split) -> None:
    scenes, images = renders(split)
    scores = judge(images, [caption(scene) for scene in scenes])
    assert scores["strict"].mean() >= 0.98
    assert scores["attr"].mean() >= 0.98
    assert scores["soft"].mean() >= 0.99


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_captions_of_other_scenes_fail(split: Split) -> None:
    scenes, images = renders(split)
    other = np.random.default_rng(1).permutation(NUM_SCENES)
    wrong = [(i, j) for i, j in enumerate(other) if set(scenes[i].objects) != set(scenes[j].objects)]
    scores = judge(images[[i for i, _ in wrong]], [caption(scenes[j]) for _, j in wrong])
    assert scores["strict"].mean() <= 0.01


def test_a_correct_image_scores_1_in_every_respect() -> None:
    assert verdict(picture(PROMPT)) == (1, 1, 1)


def test_the_order_of_naming_does_not_matter() -> None:
    assert verdict(picture("a blue square on the right and a red circle on the left, on a white background")) == (
        1,
        1,
        1,
    )


def test_swapped_colours_fail_both_shapes_and_places() -> None:
    swapped = picture("a blue circle on the left and a red square on the right, on a white background")
    assert verdict(swapped) == (0, 0, pytest.approx(4 / 8))


def test_swapped_places_fail_strict_only() -> None:
    swapped = picture("a blue square on the left and a red circle on the right, on a white background")
    assert verdict(swapped) == (0, 1, pytest.approx(6 / 8))


def test_an_object_moved_to_another_side_fails_its_place() -> None:
    image = picture("a red circle in the middle, on a white background")
    for axis, distance in ((2, -8), (2, 8), (1, -8), (1, 8)):
        moved = np.roll(image, distance, axis)
        assert verdict(moved, "a red circle in the middle") == (0, 1, pytest.approx(3 / 4))


def test_an_extra_blob_fails_the_count() -> None:
    image = picture(PROMPT)
    image[:, 1:5, 14:17] = np.array([40, 170, 60])[:, None, None]
    assert verdict(image) == (0, 0, pytest.approx(7 / 8))


def test_a_missing_object_fails_all_its_checks_and_the_count() -> None:
    image = picture(PROMPT)
    image[:, :, 16:] = 245
    assert verdict(image) == (0, 0, pytest.approx(4 / 8))


def test_another_background_fails_only_if_it_is_named() -> None:
    scene = parse_caption(PROMPT)
    image = render(replace(scene, background="black"), np.random.default_rng(0))
    assert verdict(image) == (0, 0, pytest.approx(7 / 8))
    assert verdict(image, caption(replace(scene, background_named=False))) == (1, 1, 1)


def test_noise_and_blank_images_fail() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    for image in (noise, np.full((3, 32, 32), 245, np.uint8)):
        assert verdict(image)[:2] == (0, 0)


def test_scores_do_not_depend_on_the_other_images() -> None:
    scenes, images = renders("train")
    captions = [caption(scene) for scene in scenes]
    together, alone = judge(images, captions), judge(images[-3:], captions[-3:])
    assert all(np.array_equal(together[name][-3:], alone[name]) for name in together)


def test_no_images_give_no_scores() -> None:
    scores = judge(np.zeros((0, 3, 32, 32), np.uint8), [])
    assert all(values.shape == (0,) and values.dtype == np.float32 for values in scores.values())


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        judge(np.zeros((1, 32, 32, 3), np.uint8), [PROMPT])
    with pytest.raises(ValueError, match="needs one prompt per image"):
        judge(np.zeros((1, 3, 32, 32), np.uint8), [])
    with pytest.raises(ValueError, match="not a caption"):
        judge(np.zeros((1, 3, 32, 32), np.uint8), ["a dog"])


def test_a_thousand_images_take_less_than_two_seconds() -> None:
    scenes, images = renders("train")
    captions = [caption(scene) for scene in scenes]
    start = time.perf_counter()
    judge(images, captions)
    assert time.perf_counter() - start < 2

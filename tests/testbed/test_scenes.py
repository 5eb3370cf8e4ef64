"""Scenes: grammar, splits and renders."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdpo_ray.testbed.scenes import (
    BACKGROUNDS,
    HELDOUT_SHARE,
    all_scenes,
    caption,
    is_heldout,
    parse_caption,
    render,
    sample_scene,
    scene_prompts,
)

SCENES = list(all_scenes())


def test_every_caption_parses_back_to_its_scene() -> None:
    assert all(parse_caption(caption(scene)) == scene for scene in SCENES)


def test_captions_are_distinct() -> None:
    assert len({caption(scene) for scene in SCENES}) == len(SCENES)


def test_captions_name_each_object_with_its_own_place() -> None:
    scene = parse_caption("a red circle on the left and a blue square on the right, on a white background")
    assert [(item.colour, item.shape, item.place) for item in scene.objects] == [
        ("red", "circle", "left"),
        ("blue", "square", "right"),
    ]
    assert (scene.background, scene.background_named) == ("white", True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "write it like"),
        ("a photo of a dog", "write it like"),
        ("a pink circle in the middle", "`colour` must be one of red"),
        ("a red star in the middle", "`shape` must be one of circle"),
        ("a red circle on the left", "a single object must be in the middle"),
        ("a red circle on the left and a blue square on the top", "opposite places"),
        ("a red circle on the left and a red square on the right", "different colours"),
        ("a red circle on the middle", "wrong preposition"),
        ("a red circle in the middle, on a pink background", "`background` must be one of white"),
        ("a red circle in the middle ", "write it like"),
    ],
)
def test_text_outside_the_grammar_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_caption(text)


@given(st.integers(0, 2**32 - 1))
def test_sampled_scenes_belong_to_the_given_split_and_parse_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert not is_heldout(sample_scene(rng))
    scene = sample_scene(rng, "heldout")
    assert is_heldout(scene)
    parsed = parse_caption(caption(scene))
    assert parsed.objects == scene.objects
    assert parsed.background == (scene.background if scene.background_named else BACKGROUNDS[0])


def test_the_split_depends_on_the_pair_of_objects_only() -> None:
    by_pair: dict[frozenset[tuple[str, str]], set[bool]] = {}
    for scene in SCENES:
        pair = frozenset((item.colour, item.shape) for item in scene.objects)
        by_pair.setdefault(pair, set()).add(is_heldout(scene))
    assert all(len(verdicts) == 1 for verdicts in by_pair.values())
    pairs = [verdicts for pair, verdicts in by_pair.items() if len(pair) == 2]
    assert sum(verdicts == {True} for verdicts in pairs) / len(pairs) == pytest.approx(HELDOUT_SHARE, abs=0.01)


def test_the_splits_share_no_prompt_and_are_large_enough() -> None:
    train, heldout = scene_prompts("train", 2000, seed=0), scene_prompts("heldout", 300, seed=0)
    assert len({*train, *heldout}) == 2300
    assert not any(is_heldout(parse_caption(prompt)) for prompt in train)
    assert all(is_heldout(parse_caption(prompt)) for prompt in heldout)


def test_prompts_are_the_same_in_another_process() -> None:
    code = "from cdpo_ray.testbed.scenes import scene_prompts; print(*scene_prompts('heldout', 5, seed=3), sep='\\n')"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == scene_prompts("heldout", 5, seed=3)


def test_a_shorter_prompt_list_is_a_prefix_of_a_longer_one() -> None:
    assert scene_prompts("train", 50, seed=1)[:20] == scene_prompts("train", 20, seed=1)
    assert scene_prompts("train", 20, seed=1) != scene_prompts("train", 20, seed=2)


def test_impossible_prompt_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        scene_prompts("heldout", 100_000, seed=0)
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        scene_prompts("validation", 1, seed=0)  # type: ignore[arg-type]


def test_a_render_is_a_function_of_scene_and_generator_state() -> None:
    scene = SCENES[-1]
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (3, 32, 32) and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)

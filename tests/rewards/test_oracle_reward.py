"""The oracle rewards equal the testbed's judgement."""

import numpy as np
import pytest
import torch

from cdpo_ray.rewards.scorer import load_reward
from cdpo_ray.testbed.oracle import judge
from cdpo_ray.testbed.scenes import SceneObject, caption, parse_caption, render, sample_scene


@pytest.mark.parametrize(("name", "aspect"), [("oracle", "attr"), ("oracle_strict", "strict")])
def test_a_reward_equals_the_testbeds_judgement(name: str, aspect: str) -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(40)]
    images = np.stack([render(scene, rng) for scene in scenes])
    prompts = [caption(scene) for scene in scenes[:20] + scenes[:20]]  # images of the second half show other scenes
    scores = load_reward(name, {})(torch.from_numpy(images), prompts)
    assert scores.dtype == np.float64
    assert scores.tolist() == judge(images, prompts)[aspect].tolist()
    assert set(scores[:20]) == {1.0} and 0.0 in scores[20:]


def test_only_the_strict_reward_detects_a_misplaced_object() -> None:
    there = parse_caption("a red circle on the left and a blue square on the right")
    swapped = caption(parse_caption("a red circle on the right and a blue square on the left"))
    image = torch.from_numpy(render(there, np.random.default_rng(0)))[None]
    assert there.objects[0] == SceneObject("red", "circle", "left")
    assert load_reward("oracle", {})(image, [swapped]).tolist() == [1.0]
    assert load_reward("oracle_strict", {})(image, [swapped]).tolist() == [0.0]

"""The CLIP reward against open_clip with its own settings, and PIL."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from reward_models import TINY_OPEN_CLIP as TINY
from reward_models import (
    TINY_OPEN_CLIP_CONFIG,
    build_tiny_clip,
    build_tiny_open_clip,
    pil,
    smooth_images,
)
from safetensors.torch import load_file, save_file

from cdpo_ray.errors import RewardError, StoreError
from cdpo_ray.rewards.clip import SETTINGS, WEIGHTS, ClipReward
from cdpo_ray.testbed import CLIP_DIR
from cdpo_ray.testbed.clip import load_clip
from cdpo_ray.testbed.scenes import caption, render, sample_scene

OPENAI = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
QUICKGELU, SIGLIP = f"{TINY}-quickgelu", f"{TINY}-siglip"
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    TINY: (TINY_OPEN_CLIP_CONFIG, OPENAI),
    QUICKGELU: (TINY_OPEN_CLIP_CONFIG | {"quick_gelu": True}, OPENAI | {"interpolation": "bilinear"}),
    # as SigLIP's: a text tower of its own, which attends in both directions, and images that are squashed
    SIGLIP: (
        TINY_OPEN_CLIP_CONFIG
        | {"custom_text": True, "init_logit_bias": -10}
        | {"text_cfg": TINY_OPEN_CLIP_CONFIG["text_cfg"] | {"no_causal_mask": True, "pool_type": "last"}},
        HALF | {"interpolation": "bicubic", "resize_mode": "squash"},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models in open_clip's layout."""
    root = tmp_path_factory.mktemp("clip")
    return {name: build_tiny_open_clip(root / name, name, *settings) for name, settings in MODELS.items()}


@pytest.fixture(scope="module")
def rewards(folders: dict[str, Path]) -> dict[str, ClipReward]:
    return {name: ClipReward(name, str(folder)) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def open_clips(folders: dict[str, Path]) -> dict[str, tuple[Any, Any, Any]]:
    """Model, image transform and tokenizer of open_clip, with the settings in the folder."""
    loaded = {}
    for name, folder in folders.items():
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        loaded[name] = model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")
    return loaded


@pytest.fixture(scope="module")
def tiny(rewards: dict[str, ClipReward]) -> ClipReward:
    return rewards[TINY]


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the plain model's folder, to change."""
    return Path(shutil.copytree(folders[TINY], tmp_path / "copied"))


def change_settings(folder: Path, section: str, **changes: Any) -> None:
    settings = json.loads((folder / SETTINGS).read_text())
    settings[section] |= changes
    (folder / SETTINGS).write_text(json.dumps(settings))


@pytest.mark.skipif(not list(CLIP_DIR.glob("*.safetensors")), reason="no weights in the repository")
def test_the_embedded_reward_equals_the_cosine_of_open_clip_and_pil() -> None:
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(6)]
    images, prompts = [render(scene, rng) for scene in scenes], [caption(scene) for scene in scenes]
    model, tokenizer, mean, std, size = load_clip()
    transform = open_clip.image_transform(size, is_train=False, mean=mean, std=std)
    pixels = torch.stack([transform(pil(torch.from_numpy(image))) for image in images])
    with torch.no_grad():
        found = torch.nn.functional.cosine_similarity(model.encode_image(pixels), model.encode_text(tokenizer(prompts)))
    scores = ClipReward()(torch.from_numpy(np.stack(images)), prompts)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, found.numpy(), rtol=0, atol=1e-5)
    assert scores.std() > 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (50, 81), (97, 40), (20, 28), (33, 32)])
def test_scores_of_any_image_size_equal_those_of_open_clip_with_its_own_settings(
    rewards: dict[str, ClipReward], open_clips: dict[str, tuple[Any, Any, Any]], name: str, height: int, width: int
) -> None:
    reward, (model, transform, tokenizer), images = rewards[name], open_clips[name], smooth_images(3, height, width)
    theirs = torch.stack([transform(pil(image)) for image in images])
    ours = reward.preprocess(images)
    assert ours.shape == theirs.shape
    levels = 255 * torch.tensor(reward.preprocessing["std"])[:, None, None]
    in_levels = (ours - theirs).abs() * levels  # PIL rounds to whole levels after resizing each axis
    assert in_levels.max() <= 1.5
    prompts = ["a cat", "a dog", "a cat"]
    with torch.no_grad():
        features = model.encode_image(ours).double(), model.encode_text(tokenizer(prompts)).double()
    expected = torch.nn.functional.cosine_similarity(*features)
    np.testing.assert_allclose(reward(images, prompts), expected.numpy(), rtol=0, atol=1e-5)


def test_the_activation_and_the_interpolation_change_the_scores(
    folders: dict[str, Path], rewards: dict[str, ClipReward]
) -> None:
    images, prompts = smooth_images(3, 50, 81), ["a cat", "a dog", "an ant"]
    weights = [load_file(folders[name] / WEIGHTS) for name in (TINY, QUICKGELU)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    scores = [rewards[name](images, prompts) for name in (TINY, QUICKGELU)]
    assert np.abs(scores[0] - scores[1]).min() > 1e-4


def test_an_architecture_that_is_not_the_checkpoints_is_refused_with_the_one_that_is(folders: dict[str, Path]) -> None:
    message = (
        rf"`rewards\.clip\.architecture` must be that of .*{SETTINGS}, got '{TINY}': there `quick_gelu` is True, not"
        rf" False; give '{QUICKGELU}'"
    )
    with pytest.raises(RewardError, match=message):
        ClipReward(TINY, str(folders[QUICKGELU]))


def test_settings_that_no_architecture_has_are_refused(copied: Path) -> None:
    change_settings(copied, "model_cfg", quick_gelu="perhaps")
    with pytest.raises(RewardError, match=r"`quick_gelu` is 'perhaps', not False; no architecture of open_clip has"):
        ClipReward(TINY, str(copied))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize_mode": "longest"}, r"`preprocess_cfg\.resize_mode`: Input should be 'shortest' or 'squash', got"),
        ({"interpolation": "random"}, r"`preprocess_cfg\.interpolation`: Input should be 'bicubic' or 'bilinear', got"),
        ({"std": [0.5, 0.0, 0.5]}, r"`preprocess_cfg\.std\.1`: Input should be greater than 0, got 0\.0"),
        ({"mean": [0.5]}, r"`preprocess_cfg\.mean`: List should have at least 3 items"),
    ],
)
def test_preprocessing_that_is_not_supported_is_refused(copied: Path, changes: dict[str, Any], message: str) -> None:
    change_settings(copied, "preprocess_cfg", **changes)
    with pytest.raises(StoreError, match=rf"{SETTINGS}: is damaged \({message}.*; restore the file that was published"):
        ClipReward(TINY, str(copied))


@pytest.mark.parametrize("missing", [WEIGHTS, SETTINGS])
def test_a_folder_without_weights_or_settings_is_refused(copied: Path, missing: str) -> None:
    (copied / missing).unlink()
    message = (
        rf"`rewards\.clip\.checkpoint` .*copied: must be in open_clip's layout, but has no {missing}; weights alone"
    )
    with pytest.raises(RewardError, match=message):
        ClipReward(TINY, str(copied))


def test_a_tokenizer_of_transformers_is_read_from_the_checkpoints_folder(copied: Path) -> None:
    """In the published configuration it is a hub id, which would be fetched at no revision."""
    name, config = f"{TINY}-tokenizer", TINY_OPEN_CLIP_CONFIG
    text = {**config["text_cfg"], "context_length": 20, "hf_tokenizer_name": "someone/clip"}
    build_tiny_open_clip(copied, name, config | {"text_cfg": text}, OPENAI)
    build_tiny_clip(copied)
    tokens = ClipReward(name, str(copied)).tokenizer(["cat"])
    vocabulary = json.loads((copied / "vocab.json").read_text())
    expected = [vocabulary[token] for token in ("<|startoftext|>", "cat</w>", "<|endoftext|>")]
    assert tokens.shape == (1, 20) and tokens[0, :3].tolist() == expected


def test_each_image_is_scored_with_its_own_prompt(tiny: ClipReward) -> None:
    images, prompts = smooth_images(4, 32, 32), ["a cat", "a dog", "a cat", "an ant"]
    together = tiny(images, prompts)
    single = [tiny(images[place : place + 1], [prompt])[0] for place, prompt in enumerate(prompts)]
    np.testing.assert_allclose(together, single, rtol=0, atol=1e-6)
    assert len(set(together.round(5))) == 4


def test_the_logit_scale_multiplies_the_cosine_as_in_open_clips_logits(folders: dict[str, Path]) -> None:
    images, prompts = smooth_images(3, 32, 32), ["a cat", "a dog", "an ant"]
    reward = ClipReward(TINY, str(folders[TINY]), scale="logit")
    tokens = open_clip.get_tokenizer(TINY)(prompts)
    with torch.no_grad():
        logits, _ = reward.model.get_logits(reward.preprocess(images), tokens)
    np.testing.assert_allclose(reward(images, prompts), logits.diagonal().numpy(), rtol=1e-5)
    np.testing.assert_allclose(reward.scale, 1 / 0.07, rtol=1e-6)  # open_clip's initial value


def test_the_model_has_the_checkpoints_weights(tiny: ClipReward, folders: dict[str, Path]) -> None:
    saved = load_file(folders[TINY] / WEIGHTS)
    assert all(torch.equal(value, saved[name]) for name, value in tiny.model.state_dict().items())
    assert not tiny.model.training


def test_an_unknown_architecture_is_refused(copied: Path) -> None:
    with pytest.raises(
        RewardError, match=r"`rewards\.clip\.architecture` must be an architecture of open_clip, got 'ViT-X'"
    ):
        ClipReward("ViT-X", str(copied))


def test_a_checkpoint_of_another_model_is_refused_by_its_path(copied: Path) -> None:
    save_file({"something": torch.zeros(2)}, copied / WEIGHTS)
    with pytest.raises(RewardError, match=rf"`rewards\.clip\.checkpoint` .*/copied: does not fit {TINY}: "):
        ClipReward(TINY, str(copied))

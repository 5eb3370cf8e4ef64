"""The CLIP reward against open_clip's preprocessing and PIL."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from reward_models import TINY_OPEN_CLIP as TINY
from reward_models import MakesFolder, pil, smooth_images, tiny_open_clip
from torch import Tensor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.clip import ClipReward
from cdpo_ray.testbed import CLIP_DIR
from cdpo_ray.testbed.clip import load_clip
from cdpo_ray.testbed.scenes import caption, render, sample_scene


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint file of a random ViT of open_clip."""
    folder = tmp_path_factory.mktemp("clip")
    torch.save(tiny_open_clip(folder).state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> ClipReward:
    return ClipReward(TINY, str(tiny_checkpoint))


@torch.no_grad()
def independent_scores(reward: ClipReward, pixels: Tensor, prompts: list[str]) -> np.ndarray:
    texts = reward.model.encode_text(reward.tokenizer(prompts)).double()
    features = reward.model.encode_image(pixels).double()
    return torch.nn.functional.cosine_similarity(features, texts).numpy()


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


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (50, 81), (97, 40), (20, 28), (33, 32)])
def test_preprocessing_of_any_image_size_equals_open_clips_with_pil(tiny: ClipReward, height: int, width: int) -> None:
    images = smooth_images(3, height, width)
    visual = tiny.model.visual
    transform = open_clip.image_transform(32, is_train=False, mean=visual.image_mean, std=visual.image_std)
    theirs = torch.stack([transform(pil(image)) for image in images])
    ours = tiny.preprocess(images)
    assert ours.shape == theirs.shape
    levels = 255 * torch.tensor(tiny.std)[:, None, None]
    in_levels = (ours - theirs).abs() * levels  # PIL rounds to whole levels after resizing each axis
    assert in_levels.max() <= 1.5
    prompts = ["a cat", "a dog", "a cat"]
    np.testing.assert_allclose(tiny(images, prompts), independent_scores(tiny, theirs, prompts), rtol=0, atol=5e-3)


def test_each_image_is_scored_with_its_own_prompt(tiny: ClipReward) -> None:
    images, prompts = smooth_images(4, 32, 32), ["a cat", "a dog", "a cat", "an ant"]
    together = tiny(images, prompts)
    single = [tiny(images[place : place + 1], [prompt])[0] for place, prompt in enumerate(prompts)]
    np.testing.assert_allclose(together, single, rtol=0, atol=1e-6)
    assert len(set(together.round(5))) == 4


def test_the_logit_scale_multiplies_the_cosine_as_in_open_clips_logits(tiny_checkpoint: Path) -> None:
    images, prompts = smooth_images(3, 32, 32), ["a cat", "a dog", "an ant"]
    reward = ClipReward(TINY, str(tiny_checkpoint), scale="logit")
    tokens = open_clip.get_tokenizer(TINY)(prompts)
    with torch.no_grad():
        logits, _ = reward.model.get_logits(reward.preprocess(images), tokens)
    np.testing.assert_allclose(reward(images, prompts), logits.diagonal().numpy(), rtol=1e-5)
    np.testing.assert_allclose(reward.scale, 1 / 0.07, rtol=1e-6)  # open_clip's initial value


def test_the_model_has_the_checkpoints_weights(tiny: ClipReward, tiny_checkpoint: Path) -> None:
    saved = torch.load(tiny_checkpoint, weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in tiny.model.state_dict().items())
    assert not tiny.model.training


def test_an_unknown_architecture_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(
        RewardError, match=r"`rewards\.clip\.architecture` must be an architecture of open_clip, got 'ViT-X'"
    ):
        ClipReward("ViT-X", str(tiny_checkpoint))


def test_a_checkpoint_of_another_model_is_refused_by_its_path(tiny_checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(RewardError, match=rf"`rewards\.clip\.checkpoint` .*/other\.pt: does not fit {TINY}: "):
        ClipReward(TINY, str(tmp_path / "other.pt"))


def test_a_checkpoint_that_runs_code_is_refused_and_does_not_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": MakesFolder(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(RewardError, match=rf"`rewards\.clip\.checkpoint` .*/evil\.pt: does not fit {TINY}: "):
        ClipReward(TINY, str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()

"""PickScore against plain transformers on PIL images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reward_models import build_tiny_clip, pil, smooth_images
from transformers import AutoModel, AutoProcessor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.pickscore import PickScoreReward

PROMPTS = ["a cat", "a dog, and more words than the twenty tokens that the net has places for", "a cat", "Cat  Ä"]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("pickscore"))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (50, 81), (97, 40), (20, 28)])
def test_scores_equal_the_logits_of_transformers(tiny_clip: Path, height: int, width: int) -> None:
    model, processor = AutoModel.from_pretrained(tiny_clip), AutoProcessor.from_pretrained(tiny_clip)
    images = smooth_images(4, height, width)
    inputs = processor(
        text=PROMPTS,
        images=[pil(image) for image in images],
        padding=True,
        truncation=True,
        max_length=20,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    scores = PickScoreReward(str(tiny_clip), None, str(tiny_clip), None)(images, PROMPTS)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=0, atol=2e-5)
    assert scores.dtype == np.float64 and scores.std() > 0.1


def test_the_tokenizer_reads_the_files_of_the_processor(tiny_clip: Path) -> None:
    reward = PickScoreReward(str(tiny_clip), None, str(tiny_clip), None)
    assert reward.tokenizer.tokenize("a cat dog") == ["a</w>", "cat</w>", "d", "o", "g</w>"]


def test_a_folder_that_lacks_weights_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_clip, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RewardError, match=r"/partial: lacks 1 weights of CLIPModel, the first 'visual_projection.weight'"
    ):
        PickScoreReward(str(folder), None, str(tiny_clip), None)


def test_a_processor_without_vocabulary_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "wordless")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    with pytest.raises(RewardError, match=r"`rewards\.pickscore\.processor` .*/wordless: "):
        PickScoreReward(str(tiny_clip), None, str(folder), None)


def test_a_processor_with_another_vocabulary_is_refused(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "other")
    words = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(words | {"dog</w>": len(words)}))
    with pytest.raises(RewardError, match=r"/other: must have 516 tokens to fit the checkpoint, got 517"):
        PickScoreReward(str(tiny_clip), None, str(folder), None)

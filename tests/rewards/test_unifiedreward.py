"""UnifiedReward: ratings are read strictly, and a real model of its kind writes them."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from reward_models import pil, smooth_images
from tiny_captioners import build_blip
from tiny_qwen import build_qwen3_vl
from transformers import AutoProcessor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.answers import Question
from cdpo_ray.rewards.unifiedreward import INSTRUCTION, UnifiedReward, ratings

ANSWER = ("Alignment Score (1-5): 3.5\n", "Coherence Score (1-5): 2\n", "Style Score (1-5): 4.694700002670288")


def test_the_instruction_is_that_of_the_released_model() -> None:
    found = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert found == "75d52d3ae771f89b682db3b74cdaca1c7bde373a39162bc1c9dabd63cdc9b851"


def test_ratings_are_read_by_name_in_any_order() -> None:
    found = {"alignment": 3.5, "coherence": 2.0, "style": 4.694700002670288}
    assert ratings("".join(ANSWER)) == ratings("\n".join(line.strip() for line in reversed(ANSWER))) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "Alignment Score (1-5): 3\nCoherence Score (1-5): 2",
        "Alignment Score (1-5): 3\nCoherence Score (1-5): 2\nStyle Score (1-5): 6",
        "Alignment Score (1-5): 3\nCoherence Score (1-5): 2\nStyle Score (1-5): 0.5",
        "Alignment Score (1-5): 3\nCoherence Score (1-5): 2\nStyle Score (1-5): X",
        "Alignment Score (1-5): 3\nCoherence Score (1-5): 2\nStyle Score (1-5): 4 of 5",
        "Alignment Score (1-5): 3\nCoherence Score (1-5): 2\nStyle Score (1-5): 4\nStyle Score (1-5): 1",
        "Alignment Score (1-5): 3\nAlignment Score (1-5): 3\nStyle Score (1-5): 4",
        "Alignment Score (1-5): 3 Coherence Score (1-5): 2 Style Score (1-5): 4",
        "Alignment Score (1-5): nan\nCoherence Score (1-5): 2\nStyle Score (1-5): 4",
    ],
)
def test_anything_else_is_no_rating(text: str) -> None:
    assert ratings(text) is None


@pytest.mark.parametrize(("axis", "score"), [("mean", (3.5 + 2 + 4.694700002670288) / 3), ("style", 4.694700002670288)])
def test_the_score_is_the_rating_that_the_model_writes(axis: str, score: float, tmp_path: Path) -> None:
    build_qwen3_vl(tmp_path, ANSWER)
    scores = UnifiedReward(str(tmp_path), None, axis)(smooth_images(2, 64, 64), ["a cat", "a {dog}"])  # type: ignore[arg-type]
    assert scores.tolist() == pytest.approx([score] * 2, abs=1e-12)


def test_a_batch_is_answered_as_each_image_alone_by_plain_greedy_decoding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, images, prompts = build_qwen3_vl(tmp_path), smooth_images(2, 64, 96), ["a cat", "two dogs, and more words"]
    processor = AutoProcessor.from_pretrained(tmp_path)
    reward = UnifiedReward(str(tmp_path), None, "mean")
    reward.ask.max_tokens = 4
    expected = []
    for image, prompt in zip(images, prompts, strict=True):
        chat = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|><|image_pad|><|vision_end|>{INSTRUCTION.replace('{prompt}', prompt)}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        inputs = dict(processor(text=[chat], images=[pil(image)], return_tensors="pt"))
        written: list[int] = []
        while len(written) < 4 and model.generation_config.eos_token_id not in written:
            with torch.no_grad():
                written.append(int(model(**inputs).logits[0, -1].argmax()))
            for key, value in (("input_ids", written[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
                inputs[key] = torch.cat([inputs[key], torch.tensor([[value]])], dim=1)
        expected.append(processor.tokenizer.decode(written, skip_special_tokens=True).strip())
    questions = [Question(INSTRUCTION.format(prompt=prompt), (number,)) for number, prompt in enumerate(prompts)]
    assert [answer.text for answer in reward.ask(images, questions)] == expected
    with caplog.at_level(logging.WARNING):
        assert np.isnan(reward(images, prompts)).all()
    (record,) = (record for record in caplog.records if "unifiedreward" in record.getMessage())
    assert record.getMessage().startswith("reward `unifiedreward`: 2 of 2 answers are missing or invalid; an image w")


def test_a_model_without_chat_template_is_refused(tmp_path: Path) -> None:
    build_blip(tmp_path)
    with pytest.raises(
        RewardError, match=r"^`rewards.unifiedreward.checkpoint` .*: has no chat template, so it cannot"
    ):
        UnifiedReward(str(tmp_path), None, "mean")


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    build_qwen3_vl(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        RewardError, match=r"^`rewards.unifiedreward.checkpoint` .*: cannot be loaded as AutoModelForImage"
    ):
        UnifiedReward(str(tmp_path), None, "mean")

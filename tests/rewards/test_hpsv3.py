"""HPSv3 in the released layout against plain transformers, one image at a time without padding."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_models import pil, smooth_images
from safetensors.torch import load_file, save_file
from tiny_qwen import build_hpsv3, qwen_tokenizer
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.hpsv3 import INSTRUCTION, NUM_PIXELS, HpsV3Reward

PROMPTS = ["a cat", "a dog {and} more\nwords", "<|Reward|> Ä"]


class Released:
    """Files of a tiny HPSv3, and its model with the rows of the reward token."""

    def __init__(self, folder: Path) -> None:
        self.processor, self.checkpoint = folder / "processor", folder / "HPSv3.safetensors"
        self.model: Any
        self.model, self.head = build_hpsv3(folder)

    def reward(self, checkpoint: Path | None = None) -> HpsV3Reward:
        return HpsV3Reward(str(checkpoint or self.checkpoint), None, str(self.processor), None)

    def changed(self, folder: Path, drop: str = "", **added: Tensor) -> Path:
        weights = {name: weight for name, weight in load_file(self.checkpoint).items() if name != drop} | added
        save_file(weights, folder / "changed.safetensors")
        return folder / "changed.safetensors"

    @torch.no_grad()
    def by_hand(self, image: Tensor, prompt: str, size: tuple[int, int]) -> float:
        """Mean of the preference by the parts of transformers' model, with consecutive positions."""
        picture = pil(image).resize(size[::-1], Image.Resampling.BICUBIC)
        seen = Qwen2VLImageProcessor(do_resize=False)(images=[picture], return_tensors="pt")
        tokenizer = qwen_tokenizer()
        tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
        num_image_tokens = size[0] * size[1] // 28**2
        chat = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            + "<|image_pad|>" * num_image_tokens
            + f"<|vision_end|>{INSTRUCTION.replace('{prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
        )
        tokens = torch.tensor(tokenizer(chat).input_ids)
        states = self.model.model.language_model.embed_tokens(tokens)
        visual = self.model.model.visual(seen.pixel_values, grid_thw=seen.image_grid_thw).pooler_output
        states[tokens == tokenizer.convert_tokens_to_ids("<|image_pad|>")] = visual
        states = self.model.model.language_model(inputs_embeds=states[None]).last_hidden_state[0]
        place = (tokens == len(tokenizer) - 1).nonzero()[-1].item()
        hidden = F.relu(F.linear(states[place], self.head["0.weight"], self.head["0.bias"]))
        hidden = F.relu(F.linear(hidden, self.head["3.weight"], self.head["3.bias"]))
        return F.linear(hidden, self.head["5.weight"], self.head["5.bias"])[0].item()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    return Released(tmp_path_factory.mktemp("hpsv3"))


def test_the_instruction_is_that_of_the_released_model() -> None:
    """The text of the released code; one changed space would change all scores."""
    found = hashlib.sha256(INSTRUCTION.encode()).hexdigest()
    assert found == "e61d58f3c7d3be656ccd024f5c0cd8c001cf9a2122305d52b59e60d94147e0f2"
    assert NUM_PIXELS == 448**2


@pytest.mark.parametrize(("height", "width", "size"), [(512, 512, (448, 448)), (96, 160, (364, 588))])
def test_a_batch_scores_as_each_image_alone_by_hand(
    released: Released, height: int, width: int, size: tuple[int, int]
) -> None:
    images = smooth_images(3, height, width)
    expected = [released.by_hand(image, prompt, size) for image, prompt in zip(images, PROMPTS, strict=True)]
    reward = released.reward()
    scores = reward(images, PROMPTS)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    assert scores.dtype == np.float64 and scores.std() > 0.01
    np.testing.assert_allclose(reward(images[[2, 0]], [PROMPTS[2], PROMPTS[0]]), scores[[2, 0]], rtol=0, atol=1e-5)


def test_positions_of_three_dimensions_would_change_the_score(released: Released) -> None:
    reward, image = released.reward(), smooth_images(1, 64, 64)
    inputs = reward._inputs(image, ["a cat"])
    with torch.no_grad():
        states = reward.model(**inputs).last_hidden_state[inputs["input_ids"] == reward.reward_token]
        assert abs(reward.head(states)[0, 0].item() - reward(image, ["a cat"])[0]) > 1e-3


def test_weights_keep_their_precision_and_the_head_has_fp32(released: Released, tmp_path: Path) -> None:
    halved = {
        name: weight if name.startswith("rm_head") else weight.bfloat16()
        for name, weight in load_file(released.checkpoint).items()
    }
    save_file(halved, tmp_path / "bf16.safetensors")
    reward, image = released.reward(tmp_path / "bf16.safetensors"), smooth_images(1, 64, 64)
    assert {weight.dtype for weight in reward.model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in reward.head.parameters()} == {torch.float32}
    assert reward(image, ["a cat"])[0] == pytest.approx(released.reward()(image, ["a cat"])[0], abs=0.1)


@pytest.mark.parametrize(
    ("drop", "added", "message"),
    [
        ("visual.patch_embed.proj.weight", {}, r"not a checkpoint of HPSv3: lacks 'visual.patch_embed.proj.weight'$"),
        ("model.embed_tokens.weight", {}, r": lacks 'model.embed_tokens.weight'$"),
        ("rm_head.3.bias", {}, r": lacks 'rm_head.3.bias'$"),
        ("", {"other": torch.zeros(1)}, r": has the unknown weight 'other'$"),
        ("", {"model.norm.weight": torch.zeros(3)}, r": 'model.norm.weight' must be of \[32\], got \[3\]$"),
        ("", {"rm_head.5.bias": torch.zeros(3)}, r"is not a checkpoint of HPSv3: size mismatch for 5.bias"),
    ],
)
def test_a_checkpoint_of_other_weights_is_refused_in_one_line(
    drop: str, added: dict[str, Tensor], message: str, released: Released, tmp_path: Path
) -> None:
    with pytest.raises(RewardError, match=message) as refused:
        released.reward(released.changed(tmp_path, drop, **added))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_safetensors_is_refused(released: Released, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"not weights")
    with pytest.raises(
        RewardError, match=r"^`rewards.hpsv3.checkpoint` .*bad.safetensors: is not a checkpoint of HPSv3"
    ):
        released.reward(tmp_path / "bad.safetensors")


def test_a_processor_with_another_number_of_tokens_is_refused(released: Released, tmp_path: Path) -> None:
    embedded = load_file(released.checkpoint)["model.embed_tokens.weight"]
    more = released.changed(tmp_path, **{"model.embed_tokens.weight": torch.cat([embedded, embedded[:1]])})
    with pytest.raises(RewardError, match=r"`rewards.hpsv3.processor` .*: must have 264 tokens to fit .* got 263"):
        released.reward(more)


def test_the_tiny_model_has_the_names_and_kinds_of_the_released_file(released: Released) -> None:
    """Of the released file the number of weights is known: 736, of 32 visual and 28 text layers."""
    weights = load_file(released.checkpoint)
    model: Qwen2VLForConditionalGeneration = released.model
    of_text = sum(name.startswith("model.layers.0.") for name in weights)
    of_image = sum(name.startswith("visual.blocks.0.") for name in weights)
    others = len(weights) - of_text * len(model.model.language_model.layers) - of_image * len(model.model.visual.blocks)
    assert 28 * of_text + 32 * of_image + others == 736

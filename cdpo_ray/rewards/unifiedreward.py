"""Images -> ratings that UnifiedReward, a vision-language model, writes as text."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.errors import printable
from cdpo_ray.rewards.answers import Answer, Question, warn_of_invalid
from cdpo_ray.rewards.vision_language import VisionLanguageModel
from cdpo_ray.rewards.weights import hub_folder

KEY = "rewards.unifiedreward.checkpoint"
AXES = ("alignment", "coherence", "style")
MAX_TOKENS = 160  # three lines with numbers of up to seventeen digits, each of which is a token

INSTRUCTION = (
    "You are presented with a generated image and its associated text caption. Your task is to analyze the image across"
    " multiple dimensions in relation to the caption. Specifically:\n"
    "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
    "Output your evaluation using the format below:\n\n"
    "Alignment Score (1-5): X\n"
    "Coherence Score (1-5): Y\n"
    "Style Score (1-5): Z\n\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
"""Text that UnifiedReward 2.0 rates single images with, to the letter."""


class UnifiedReward:
    """Rating from 1 to 5, or NaN where the model writes something else. Source: arXiv:2503.05236.

    Args:
        checkpoint: folder or hub id of UnifiedReward 2.0.
        revision: commit of the hub id.
        axis: one of `AXES`, or their mean.

    Raises:
        RewardError: if the model cannot be loaded, or is not a chat model.
    """

    def __init__(
        self, checkpoint: str, revision: str | None, axis: Literal["mean", "alignment", "coherence", "style"]
    ) -> None:
        self.ask = VisionLanguageModel(hub_folder(checkpoint, revision, key=KEY), max_tokens=MAX_TOKENS, key=KEY)
        self.axes = AXES if axis == "mean" else (axis,)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        texts = [INSTRUCTION.format(prompt=prompt) for prompt in prompts]
        answers = self.ask(images, [Question(text, (number,)) for number, text in enumerate(texts)])
        found = [ratings(answer.text) for answer in answers]
        faults = ["" if rated else _fault(answer) for answer, rated in zip(answers, found, strict=True)]
        warn_of_invalid("unifiedreward", faults, "an image without three ratings from 1 to 5 has no score")
        return np.array([np.mean([rated[axis] for axis in self.axes]) if rated else np.nan for rated in found])


def ratings(text: str) -> dict[str, float] | None:
    """Rating by axis of `AXES`; `None`: the text does not give each of them once, as a number from 1 to 5."""
    lines = re.findall(r"^(\w+) Score \(1-5\): (\d(?:\.\d+)?)$", text, flags=re.MULTILINE)
    found = {axis.lower(): float(number) for axis, number in lines}
    is_valid = len(lines) == len(AXES) and sorted(found) == sorted(AXES)
    return found if is_valid and all(1 <= number <= 5 for number in found.values()) else None


def _fault(answer: Answer) -> str:
    return answer.fault or f"the model wrote {printable(repr(answer.text), 200)}"

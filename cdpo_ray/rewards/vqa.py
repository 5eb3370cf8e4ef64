"""Images and prompts -> share of questions about the prompt's content that are answered right."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.errors import PromptError, RewardError, printable
from cdpo_ray.prompts.questions import VqaQuestion, read_questions
from cdpo_ray.rewards.answers import Answer, Question, json_value, refuse_faults, warn_of_invalid
from cdpo_ray.rewards.vision_language import model_to_ask

log = logging.getLogger(__name__)
NAME = "vqa"
REPLY = 'Answer with JSON alone: {"answer": yes, no, a number, or one or two words}.'
REPLY_IN_ONE_WORD = "Answer in one word."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MAX_TOKENS = 100


class VqaReward:
    """Share of a prompt's questions that are answered right, or the expected share; 0 to 1.

    NaN for a prompt without questions, and for an image with a question whose answer is missing or invalid.

    Source: arXiv:2303.11897 (TIFA), arXiv:2512.16853 (Soft-TIFA, the expected share).

    Args:
        questions: path of the file of questions.
        read: ``json``, or ``probabilities`` of the answer's first token.
        checkpoint, revision, endpoint: see `model_to_ask`.

    Raises:
        RewardError: if the questions cannot be read, a model cannot be loaded, or the endpoint's token is missing.
    """

    def __init__(
        self,
        *,
        questions: str | None,
        read: str,
        checkpoint: str | None,
        revision: str | None,
        endpoint: Mapping[str, Any] | None,
    ) -> None:
        assert questions is not None, "the config requires a file of questions"
        try:
            self.questions = read_questions(Path(questions))
        except PromptError as error:
            raise RewardError(f"`rewards.vqa.questions` {error}") from None
        self.reads_json = read == "json"
        self.ask = model_to_ask(
            NAME, checkpoint=checkpoint, revision=revision, endpoint=endpoint, max_tokens=MAX_TOKENS
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Scores ``[image]`` of uint8 ``[image, 3, height, width]``, with one prompt each.

        Raises:
            RewardError: if no question was answered.
        """
        asked = [(number, each) for number, prompt in enumerate(prompts) for each in self.questions.get(prompt, ())]
        answers = self.ask(images, [self._question(each, number) for number, each in asked])
        refuse_faults(NAME, answers)
        right: list[list[float]] = [[] for _ in prompts]
        faults = [""] * len(asked)
        for place, ((number, each), answer) in enumerate(zip(asked, answers, strict=True)):
            try:
                right[number].append(self._is_right(answer, each))
            except ValueError as error:
                faults[place] = str(error)
                right[number].append(float("nan"))
        warn_of_invalid(NAME, faults, "such images have no score")
        if without := [prompt for prompt, shares in zip(prompts, right, strict=True) if not shares]:
            log.warning(
                "reward `%s`: %d of %d images have no score, because the file has no questions for their prompts,"
                " the first: %s",
                NAME, len(without), len(prompts), printable(without[0]),
            )  # fmt: skip
        return np.array([np.mean(shares) if shares else np.nan for shares in right])

    def _question(self, asked: VqaQuestion, number: int) -> Question:
        if self.reads_json:
            return Question(f"{asked.question} {REPLY}", (number,))
        right = _plain(asked.answer)
        spellings = (right, NUMBERS[int(right)]) if right in map(str, range(10)) else (right,)
        return Question(f"{asked.question} {REPLY_IN_ONE_WORD}", (number,), (spellings,))

    def _is_right(self, answer: Answer, asked: VqaQuestion) -> float:
        if self.reads_json:
            return float(_plain(json_value(answer, "answer", str)) == _plain(asked.answer))
        if answer.fault:
            raise ValueError(answer.fault)
        return answer.probabilities[0]


def _plain(answer: str) -> str:
    """An answer without case, articles and punctuation, and with numbers as digits."""
    words = re.sub(r"[^\w\s-]", " ", answer.casefold()).split()
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(str(NUMBERS.index(word)) if word in NUMBERS else word for word in words)

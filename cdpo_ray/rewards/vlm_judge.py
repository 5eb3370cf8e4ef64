"""Images and prompts -> scores by a vision-language model: a rating, the probability of "yes", or choices of pairs."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.rewards.answers import Answer, Choices, Question, chosen, json_value, refuse_faults, warn_of_invalid
from cdpo_ray.rewards.bradley_terry import bradley_terry
from cdpo_ray.rewards.vision_language import model_to_ask

log = logging.getLogger(__name__)
NAME = "vlm_judge"
QUESTIONS = {
    "rating": (
        'Rate how well the image shows this prompt: "{prompt}". Consider whether each object, number, colour, position'
        " and relation of the prompt is right, and whether the image has visible flaws. {low} means that it shows"
        " nothing of the prompt or is badly flawed, {high} that it shows all of the prompt without flaws."
    ),
    "yes_no": 'Does this figure show "{prompt}"?',  # the question of VQAScore
    "pairwise": (
        'Two images were made for this prompt: "{prompt}". Which one is better: which shows each object, number,'
        " colour, position and relation of the prompt, and has fewer visible flaws?"
    ),
}
"""Mode -> question; `{low}` and `{high}` are the ends of the scale."""
REPLIES = {
    "rating": ("Answer with one number from {low} to {high}.", 'Answer with JSON alone: {"rating": a number}.'),
    "yes_no": ("Please answer yes or no.", 'Answer with JSON alone: {"answer": "yes" or "no"}.'),
    "pairwise": (
        "Answer with 1 for the first image, or 2 for the second.",
        'Answer with JSON alone: {"better": 1 for the first image, or 2 for the second}.',
    ),
}
"""Mode -> what follows the question if probabilities are read, and if JSON is."""
YES_OR_NO: Choices = (("yes",), ("no",))
FIRST_OR_SECOND: Choices = (("1",), ("2",))
MIN_MASS = 0.01
"""Least probability that an answer begins with one of its choices; below, the model answers something else."""
MAX_TOKENS = 100
MAX_POSITION_BIAS, MIN_CHOICES = 0.15, 20
"""Distance from one half of the share of first images preferred that is a warning, and number of choices to tell."""


class VlmJudgeReward:
    """Score of each image, NaN if an answer about it is missing or invalid.

    ``rating``: the expected rating, or the rating that a JSON text states. ``yes_no``: the probability of "yes", or 1
    or 0. ``pairwise``: Bradley-Terry strengths over the images of a prompt, see `bradley_terry`.

    Source: arXiv:2404.01291 (``yes_no``).

    Args:
        mode: ``rating``, ``yes_no`` or ``pairwise``.
        read: ``probabilities`` of the answer's first token, or ``json``.
        question: question with `{prompt}`; `None`: that of the mode.
        scale: lowest and highest rating.
        opponents: number of images that each image is compared with; `None`: all of its prompt.
        checkpoint, revision, endpoint: see `model_to_ask`.

    Raises:
        RewardError: if a model cannot be loaded, or the endpoint's token is missing.
    """

    def __init__(
        self,
        *,
        mode: str,
        read: str,
        question: str | None,
        scale: tuple[int, int],
        opponents: int | None,
        checkpoint: str | None,
        revision: str | None,
        endpoint: Mapping[str, Any] | None,
    ) -> None:
        self.mode, self.scale, self.opponents = mode, scale, opponents
        self.reads_json = read == "json"
        self.question = f"{question or QUESTIONS[mode]} {REPLIES[mode][self.reads_json]}"
        self.whole_prompts = mode == "pairwise"
        self.ask = model_to_ask(
            NAME, checkpoint=checkpoint, revision=revision, endpoint=endpoint, max_tokens=MAX_TOKENS
        )
        self.num_choices, self.num_first, self.has_warned = 0, 0.0, False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Scores ``[image]`` of uint8 ``[image, 3, height, width]``, with one prompt each.

        Raises:
            RewardError: if no question was answered.
        """
        if self.mode == "pairwise":
            return self._strengths(images, prompts)
        shown = [(number,) for number in range(len(prompts))]
        return self._values(images, [self._asked(prompt, few) for prompt, few in zip(prompts, shown, strict=True)])

    def _asked(self, prompt: str, shown: tuple[int, ...]) -> Question:
        low, high = self.scale
        choices: Choices = ()
        if not self.reads_json:
            ratings: Choices = tuple((str(rating),) for rating in range(low, high + 1))
            choices = {"rating": ratings, "yes_no": YES_OR_NO, "pairwise": FIRST_OR_SECOND}[self.mode]
        text = self.question.replace("{low}", str(low)).replace("{high}", str(high))
        return Question(text.replace("{prompt}", prompt), shown, choices)  # last: a prompt may hold braces

    def _values(self, images: Tensor, questions: Sequence[Question]) -> NDArray[np.float64]:
        """Value of each answer ``[question]``: a rating, or the probability of "yes" or of the first image."""
        answers = self.ask(images, questions)
        refuse_faults(NAME, answers)
        values, faults = np.full(len(answers), np.nan), [""] * len(answers)
        for number, answer in enumerate(answers):
            try:
                values[number] = self._from_json(answer) if self.reads_json else self._from_probabilities(answer)
            except ValueError as error:
                faults[number] = str(error)
        consequence = (
            "a comparison without an answer does not count" if self.whole_prompts else "such images have no score"
        )
        warn_of_invalid(NAME, faults, consequence)
        return values

    def _from_probabilities(self, answer: Answer) -> float:
        probabilities, fault = chosen(answer, MIN_MASS)
        if fault:
            raise ValueError(fault)
        if self.mode == "yes_no":
            return probabilities[0]  # as VQAScore: not a share of yes and no
        if self.mode == "pairwise":
            return probabilities[0] / sum(probabilities)
        return float(np.average(np.arange(self.scale[0], self.scale[1] + 1), weights=probabilities))

    def _from_json(self, answer: Answer) -> float:
        if self.mode == "rating":
            low, high = self.scale
            return json_value(answer, "rating", float, low=low, high=high)
        if self.mode == "yes_no":
            said = json_value(answer, "answer", str).strip().casefold()
            if said not in ("yes", "no"):
                raise ValueError(f"must be yes or no, got {said[:100]!r}")
            return float(said == "yes")
        better = json_value(answer, "better", float, low=1, high=2)
        if better not in (1, 2):
            raise ValueError(f"must be 1 or 2, got {better:g}")
        return 2 - better

    def _strengths(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        by_prompt: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_prompt.setdefault(prompt, []).append(number)
        shown = [
            (prompt, pair)
            for prompt, numbers in by_prompt.items()
            for few in _compared(len(numbers), self.opponents)
            for pair in [(numbers[few[0]], numbers[few[1]])]
        ]
        preferred = np.full((len(prompts), len(prompts)), np.nan)
        if shown:
            values = self._values(images, [self._asked(prompt, pair) for prompt, pair in shown])
            first, second = np.array([pair for _, pair in shown]).T
            preferred[first, second] = values
            self._report_position(values[np.isfinite(values)])
        strengths = np.full(len(prompts), np.nan)
        for numbers in by_prompt.values():
            strengths[numbers], _ = bradley_terry(preferred[np.ix_(numbers, numbers)])
        return strengths

    def _report_position(self, values: NDArray[np.float64]) -> None:
        """Report how often the first of two images was preferred, a half without position bias, so far."""
        self.num_choices += len(values)
        self.num_first += float(values.sum())
        share = self.num_first / max(self.num_choices, 1)
        message = "reward `%s`: the image shown first was preferred in %.0f %% of %d comparisons%s"
        is_biased = abs(share - 0.5) > MAX_POSITION_BIAS and self.num_choices >= MIN_CHOICES
        if is_biased and not self.has_warned:
            self.has_warned = True
            advice = "; each pair is shown in both orders and the bias is estimated, but little else may decide"
            log.warning(message, NAME, 100 * share, self.num_choices, advice)
        else:
            log.info(message, NAME, 100 * share, self.num_choices, "")


def _compared(num_images: int, opponents: int | None) -> list[tuple[int, int]]:
    """Ordered pairs of images to compare: all, or each image with its neighbours in a ring; always in both orders."""
    nearest = num_images if opponents is None else opponents // 2
    return [
        (first, second)
        for first in range(num_images)
        for second in range(num_images)
        if first != second and min((first - second) % num_images, (second - first) % num_images) <= nearest
    ]

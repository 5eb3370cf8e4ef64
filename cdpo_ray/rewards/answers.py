"""Questions about images, the answers of a vision-language model, and what an invalid answer is."""

import json
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from cdpo_ray.errors import RewardError, printable

log = logging.getLogger(__name__)
Choices = tuple[tuple[str, ...], ...]
"""Answers to choose from, each with its spellings; a spelling is one token, whatever its case and spaces."""


class Question(NamedTuple):
    """A question about some of the images of a call.

    Attributes:
        text: the question itself.
        images: numbers of the images, in the order in which the model sees them.
        choices: answers whose probabilities are wanted; empty: the answer is a text.
    """

    text: str
    images: tuple[int, ...]
    choices: Choices = ()


class Answer(NamedTuple):
    """A model's answer.

    Attributes:
        text: the answer as text; empty if the question has choices.
        fault: why there is no answer; empty: there is one.
        probabilities: of each choice, the probability that the answer begins with it.
    """

    text: str = ""
    fault: str = ""
    probabilities: tuple[float, ...] = ()


class Asks(Protocol):
    """Answers questions about images, uint8 ``[image, 3, height, width]``: one answer per question."""

    def __call__(self, images: Tensor, questions: Sequence[Question]) -> list[Answer]: ...


def refuse_faults(reward: str, answers: Sequence[Answer]) -> None:
    """Raise RewardError if no question was answered, as by a server that is down."""
    if answers and all(answer.fault for answer in answers):
        raise RewardError(f"reward `{reward}`: none of {len(answers)} questions was answered: {answers[0].fault}")


def warn_of_invalid(reward: str, faults: Sequence[str], consequence: str) -> None:
    """One warning about the answers that are missing or invalid.

    Args:
        faults: by question, why the answer is invalid; empty: it is valid.
        consequence: what follows for an image.
    """
    if found := [fault for fault in faults if fault]:
        log.warning(
            "reward `%s`: %d of %d answers are missing or invalid; %s; the first: %s",
            reward, len(found), len(faults), consequence, found[0],
        )  # fmt: skip


def chosen(answer: Answer, min_mass: float) -> tuple[tuple[float, ...], str]:
    """Probabilities of the choices, and why they are invalid; empty: they are valid.

    Args:
        min_mass: probability that the choices must have together.
    """
    if answer.fault:
        return (), answer.fault
    if sum(answer.probabilities) < min_mass:
        return (), (
            f"the model's answer begins with one of the choices with a probability of {sum(answer.probabilities):.2g},"
            f" less than {min_mass:g}"
        )
    return answer.probabilities, ""


def json_value(answer: Answer, key: str, kind: type, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """Value of a key in an answer that must be a JSON object; text around the object is ignored.

    Args:
        kind: `float` for a number from ``low`` to ``high``, `str` for a short text.

    Raises:
        ValueError: there is no answer, or it is not such an object.
    """
    if answer.fault:
        raise ValueError(answer.fault)
    wanted = "a text" if kind is str else f"a number from {low:g} to {high:g}"
    try:
        found = json.loads(answer.text[answer.text.index("{") : answer.text.rindex("}") + 1])[key]
        if kind is str:
            found = {True: "yes", False: "no"}[found] if isinstance(found, bool) else found
            is_valid = isinstance(found, str | int) and bool(str(found).strip())
        else:
            is_valid = isinstance(found, int | float) and not isinstance(found, bool) and low <= found <= high
        if is_valid:
            return kind(found)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f'must be JSON with {wanted} under "{key}", got {printable(repr(answer.text), 100)}')

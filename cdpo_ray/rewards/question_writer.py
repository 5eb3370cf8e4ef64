"""Prompts -> questions about their images, written by a language model."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cdpo_ray.errors import PromptError, printable
from cdpo_ray.prompts.questions import KINDS, parsed_questions, questions_line
from cdpo_ray.rewards.answers import Question, refuse_faults
from cdpo_ray.rewards.endpoint import Endpoint
from cdpo_ray.store.failures import storage_errors

INSTRUCTION = (
    "An image was made for the prompt below. Write questions that decide whether the image shows what the prompt says:"
    f" one for each fact of the prompt, of the kinds {', '.join(KINDS)}. Each must be answered by the image alone, with"
    " yes, no, a number or one word. Do not ask about anything that the prompt leaves open. Answer with JSON alone:"
    ' {"questions": [{"question": "How many cats are there?", "answer": "2", "kind": "count"}]}\nPrompt: '
)
MAX_TOKENS = 2000
PROMPTS_AT_ONCE = 64
"""Number of prompts after which the file is written: an interrupted command continues from there."""


def write_questions(prompts: Sequence[str], path: Path, endpoint: Mapping[str, Any]) -> tuple[int, str, list[str]]:
    """Append the questions of prompts to a file, which is opened before the first request.

    Args:
        endpoint: keyword arguments of `Endpoint`.

    Returns:
        Number of prompts that were written, the number of requests and tokens as text, and one line for each prompt
        that has no valid questions.

    Raises:
        RewardError: the server answers nothing.
        StoreError: the file cannot be written.
    """
    ask = Endpoint(**endpoint, max_tokens=MAX_TOKENS, key="rewards.vqa.endpoint")
    num_written, faults = 0, []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        few = prompts[start : start + PROMPTS_AT_ONCE]
        _end_last_line(path)  # before the requests: answers that cannot be written would be paid for
        answers = ask(torch.empty(0), [Question(INSTRUCTION + prompt, ()) for prompt in few])
        refuse_faults("vqa", answers)
        lines = []
        for prompt, answer in zip(few, answers, strict=True):
            try:
                if answer.fault:
                    raise PromptError(answer.fault)
                lines.append(questions_line(prompt, parsed_questions(answer.text)))
            except PromptError as fault:
                faults.append(f"  {printable(prompt)}: {fault}")
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        num_written += len(lines)
    return num_written, ask.cost, faults


def _end_last_line(path: Path) -> None:
    """Add the newline that the file's last line may lack; a missing file is created.

    Raises:
        StoreError: the file cannot be written.
    """
    with storage_errors(path), path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"\n" * (file.read(1) != b"\n"))

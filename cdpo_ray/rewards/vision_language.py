"""Questions about images -> answers of a vision-language model in this process."""

import functools
import logging
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdpo_ray.dataflow.memory import is_out_of_memory
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.answers import Answer, Asks, Question
from cdpo_ray.rewards.endpoint import Endpoint
from cdpo_ray.rewards.weights import from_folder, hub_folder, model_from_folder

log = logging.getLogger(__name__)


class VisionLanguageModel:
    """Model of transformers on the device; greedy decoding, so answers are deterministic.

    A forward pass holds at most as many questions as the call has images; out of memory, the number is halved.

    Args:
        folder: folder with processor, configuration and safetensors weights.
        max_tokens: maximum number of tokens of a text.
        key: config key to name in errors.
        captions_only: also take a model without a chat template, which captions an image and ignores the question.

    Raises:
        RewardError: if the folder cannot be loaded.
    """

    def __init__(self, folder: Path, *, max_tokens: int, key: str, captions_only: bool = False) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor: Any = from_folder(AutoProcessor, folder, key=key)
        if self.processor.chat_template is None and not captions_only:
            raise RewardError(
                f"`{key}` {folder}: has no chat template, so it cannot answer questions; give a chat model"
            )
        model: Any = model_from_folder(AutoModelForImageTextToText, folder, key=key, dtype="auto")
        self.model = model.eval().to(self.device)
        self.processor.tokenizer.padding_side = "left"  # new tokens are appended on the right
        self.max_tokens, self.where = max_tokens, f"`{key}` {folder}"
        self.max_questions = sys.maxsize

    def __call__(self, images: Tensor, questions: Sequence[Question]) -> list[Answer]:
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        answers: list[Answer] = []
        while len(answers) < len(questions):
            size = min(self.max_questions, len(pictures))
            batch = questions[len(answers) : len(answers) + size]
            try:
                answers += self._answered(pictures, batch)
            except Exception as error:
                if not is_out_of_memory(error) or len(batch) == 1:
                    raise
                self.max_questions = len(batch) // 2
                log.warning("%s: out of memory with %d questions at once, retrying with %d",
                            self.where, len(batch), self.max_questions)  # fmt: skip
        return answers

    @torch.no_grad()
    def _answered(self, pictures: Sequence[Image.Image], questions: Sequence[Question]) -> list[Answer]:
        inputs = self._inputs(pictures, questions).to(self.device, self.model.dtype)
        greedy = {"do_sample": False, "num_beams": 1}
        if questions[0].choices:
            found = self.model.generate(
                **inputs, **greedy, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
            )
            probabilities = found.logits[0].float().softmax(-1).cpu()  # of the whole vocabulary, unprocessed
            return [self._chosen(row, question) for row, question in zip(probabilities, questions, strict=True)]
        tokens = self.model.generate(**inputs, **greedy, max_new_tokens=self.max_tokens)
        if "input_ids" in inputs and not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # the output repeats the input
        return [
            Answer(text) if (text := decoded.strip()) else Answer(fault="the model returned an empty text")
            for decoded in self.processor.batch_decode(tokens, skip_special_tokens=True)
        ]

    def _chosen(self, probabilities: Tensor, question: Question) -> Answer:
        """Probability of each choice: the sum over the tokens that spell it."""
        found = []
        for spellings in question.choices:
            tokens = [token for spelling in spellings for token in self._tokens[spelling]]
            if not tokens:
                raise RewardError(
                    f"{self.where}: has no token for {spellings[0]!r}, so its probability is unknown; set `read: json`"
                )
            found.append(probabilities[tokens].sum().item())
        return Answer(probabilities=tuple(found))

    @functools.cached_property
    def _tokens(self) -> Mapping[str, list[int]]:
        """Word -> tokens that are this word, in any case, with spaces or without."""
        tokenizer = self.processor.tokenizer
        found: defaultdict[str, list[int]] = defaultdict(list)
        for token, word in enumerate(tokenizer.batch_decode([[token] for token in range(len(tokenizer))])):
            found[word.strip().casefold()].append(token)
        return found

    def _inputs(self, pictures: Sequence[Image.Image], questions: Sequence[Question]) -> Any:
        shown = [[pictures[number] for number in question.images] for question in questions]
        if self.processor.chat_template is None:
            return self.processor(images=[few[0] for few in shown], return_tensors="pt")
        chats = [self._chat(question) for question in questions]
        bos = self.processor.tokenizer.bos_token
        return self.processor(
            text=chats,
            images=shown,
            add_special_tokens=not (bos and chats[0].startswith(bos)),  # no second start token
            padding=True,
            return_tensors="pt",
        )

    def _chat(self, question: Question) -> str:
        content = [*({"type": "image"} for _ in question.images), {"type": "text", "text": question.text}]
        chat: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return chat


def model_to_ask(
    reward: str,
    *,
    checkpoint: str | None,
    revision: str | None,
    endpoint: Mapping[str, Any] | None,
    max_tokens: int,
    checkpoint_key: str = "checkpoint",
    captions_only: bool = False,
) -> Asks:
    """The model that a reward asks: behind its endpoint, or in this process.

    Args:
        reward: name of the reward, for errors.
        checkpoint, revision: folder or hub id of a model, and commit of a hub id.
        endpoint: keyword arguments of `Endpoint`; `None`: ``checkpoint`` is used.
        max_tokens: maximum number of tokens of a text.
        checkpoint_key: name of the reward's option that holds the checkpoint.
        captions_only: see `VisionLanguageModel`.

    Raises:
        RewardError: if the model cannot be loaded, or the endpoint's token is missing.
    """
    if endpoint is not None:
        return Endpoint(**endpoint, max_tokens=max_tokens, key=f"rewards.{reward}.endpoint")
    assert checkpoint is not None, "the config requires a checkpoint or an endpoint"
    key = f"rewards.{reward}.{checkpoint_key}"
    folder = hub_folder(checkpoint, revision, key=key)
    return VisionLanguageModel(folder, max_tokens=max_tokens, key=key, captions_only=captions_only)

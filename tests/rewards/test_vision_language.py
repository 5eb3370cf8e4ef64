"""A vision-language model in this process: answers against plain forward passes and greedy decoding."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_captioners import (
    BERT_MARKS,
    CHOICES,
    LLAVA_MARKS,
    WORDS,
    build_blip,
    build_llava,
    first_token_softmax,
    prepared,
    smooth_images,
    token_of,
)
from torch import Tensor
from transformers import BlipForConditionalGeneration, LlavaForConditionalGeneration

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.answers import Question
from cdpo_ray.rewards.vision_language import VisionLanguageModel


@torch.no_grad()
def greedy(next_logits: Callable[[list[int]], Tensor], begin: list[int], end: int, num_tokens: int) -> list[int]:
    """Greedy decoding without a cache."""
    tokens: list[int] = []
    while len(tokens) < num_tokens and end not in tokens:
        tokens.append(int(next_logits(begin + tokens).argmax()))
    return tokens


def test_captions_of_blip_equal_plain_greedy_decoding(tmp_path: Path) -> None:
    folder, images = build_blip(tmp_path / "blip"), smooth_images(5)
    net = BlipForConditionalGeneration.from_pretrained(folder).eval()
    words = dict(enumerate((*BERT_MARKS, *WORDS)))
    expected = []
    for image in images:
        seen = net.vision_model(prepared(image)).last_hidden_state
        tokens = greedy(
            lambda so_far, seen=seen: net.text_decoder(torch.tensor([so_far]), encoder_hidden_states=seen).logits[
                0, -1
            ],
            begin=[BERT_MARKS.index("[CLS]")],
            end=BERT_MARKS.index("[SEP]"),
            num_tokens=8,
        )
        expected.append(" ".join(words[token] for token in tokens if words[token] in WORDS))
    model = VisionLanguageModel(folder, max_tokens=8, key="k", captions_only=True)
    found = model(images, [Question("not used", (number,)) for number in range(5)])
    assert [answer.text for answer in found] == expected
    assert len(set(expected)) > 2


def test_a_chat_model_gets_the_question_with_each_image_and_only_its_reply_is_kept(tmp_path: Path) -> None:
    folder, images = build_llava(tmp_path / "llava"), smooth_images(5)
    net = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    words = [*LLAVA_MARKS, *WORDS]
    prompt = ["USER", *["<image>"] * 16, "a", "red", "bird", "ASSISTANT"]
    expected = []
    for image in images:
        tokens = greedy(
            lambda so_far, image=image: net(torch.tensor([so_far]), pixel_values=prepared(image)).logits[0, -1],
            begin=[words.index(word) for word in prompt],
            end=words.index("</s>"),
            num_tokens=8,
        )
        expected.append(" ".join(words[token] for token in tokens if token > words.index("<image>")))
    model = VisionLanguageModel(folder, max_tokens=8, key="k")
    found = model(images, [Question("a red bird", (number,)) for number in range(5)])
    assert [answer.text for answer in found] == expected
    assert len(set(expected)) > 2


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llava(tmp_path_factory.mktemp("models") / "llava", CHOICES)


QUESTIONS = [
    Question("a red bird", (0,), (("yes",), ("no",))),
    Question("the blue bike and the dog", (1,), (("yes",), ("no",))),  # longer: the others are padded
    Question("a cat", (2,), (("1",), ("2", "two"))),
]


def test_probabilities_are_those_of_a_plain_forward_pass_summed_over_spellings(chat_dir: Path) -> None:
    images = smooth_images(3)
    found = VisionLanguageModel(chat_dir, max_tokens=8, key="k")(images, QUESTIONS)
    for question, answer in zip(QUESTIONS, found, strict=True):
        expected = first_token_softmax(chat_dir, [images[question.images[0]]], question.text)
        spelled = {"yes": ("Yes", "yes", "YES"), "no": ("no",), "1": ("1",), "2": ("2", "two")}
        by_hand = [sum(expected[token_of(word)] for word in spelled[each[0]]) for each in question.choices]
        assert answer.probabilities == pytest.approx([float(share) for share in by_hand], abs=1e-5)
    assert len({round(answer.probabilities[0], 4) for answer in found}) == 3


def test_two_images_are_seen_in_the_order_of_the_question(chat_dir: Path) -> None:
    images = smooth_images(2)
    asked = [Question("one of two", pair, (("1",), ("2",))) for pair in ((0, 1), (1, 0))]
    found = VisionLanguageModel(chat_dir, max_tokens=8, key="k")(images, asked)
    for question, answer in zip(asked, found, strict=True):
        expected = first_token_softmax(chat_dir, [images[number] for number in question.images], question.text)
        assert answer.probabilities == pytest.approx([expected[token_of(word)].item() for word in "12"], abs=1e-5)
    assert abs(found[0].probabilities[0] - found[1].probabilities[0]) > 1e-4


def test_batched_answers_equal_single_ones(chat_dir: Path) -> None:
    images, model = smooth_images(3), VisionLanguageModel(chat_dir, max_tokens=8, key="k")
    for batch in (QUESTIONS, [question._replace(choices=()) for question in QUESTIONS]):
        together = model(images, batch)
        alone = [answer for question in batch for answer in model(images, [question])]
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def test_out_of_memory_the_questions_of_a_pass_are_halved_down_to_one(
    chat_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, model = smooth_images(3), VisionLanguageModel(chat_dir, max_tokens=8, key="k")
    expected, answered = model(images, QUESTIONS), model._answered

    def limited(pictures: object, questions: list[Question], limit: int = 1) -> object:
        if len(questions) > limit:
            raise MemoryError
        return answered(pictures, questions)

    monkeypatch.setattr(model, "_answered", limited)
    with caplog.at_level(logging.WARNING):
        found = model(images, QUESTIONS)
    assert [answer.probabilities[0] for answer in found] == pytest.approx(
        [answer.probabilities[0] for answer in expected], abs=1e-5
    )
    assert caplog.messages == [f"`k` {chat_dir}: out of memory with 3 questions at once, retrying with 1"]
    monkeypatch.setattr(model, "_answered", lambda *_: limited(*_, limit=0))
    with pytest.raises(MemoryError):
        model(images, QUESTIONS)


def test_a_choice_without_a_token_is_refused_with_a_remedy(chat_dir: Path) -> None:
    model = VisionLanguageModel(chat_dir, max_tokens=8, key="rewards.vqa.checkpoint")
    with pytest.raises(RewardError, match=r"`rewards\.vqa\.checkpoint` .*: has no token for 'grey', .*`read: json`"):
        model(smooth_images(1), [Question("a cat", (0,), (("grey",),))])


def test_a_captioning_model_cannot_answer_questions(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"`k` .*/blip: has no chat template, so it cannot answer questions"):
        VisionLanguageModel(build_blip(tmp_path / "blip"), max_tokens=8, key="k")

"""`vqa`: right answers by hand, missing questions, answers that are invalid, and a file written by a model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caption_server import CaptionServer, choosing, failing, saying
from tiny_captioners import build_llava, first_token_softmax, smooth_images, token_of
from transformers import LlavaForConditionalGeneration

from cdpo_ray.config import VqaOptions
from cdpo_ray.errors import RewardError, StoreError
from cdpo_ray.prompts.questions import VqaQuestion, read_questions
from cdpo_ray.rewards.answers import Question
from cdpo_ray.rewards.question_writer import write_questions
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.rewards.vision_language import VisionLanguageModel

pytestmark = pytest.mark.usefixtures("local_answers")


def written(path: Path, **questions: list[tuple[str, str]]) -> Path:
    rows = [
        {"prompt": prompt.replace("_", " "), "questions": [{"question": q, "answer": a} for q, a in asked]}
        for prompt, asked in questions.items()
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def scorer(path: Path, **options: Any) -> Scorer:
    return Scorer({"vqa": VqaOptions(questions=str(path), **options).model_dump(mode="json")})


def endpoint(server: CaptionServer) -> dict[str, Any]:
    return {"url": server.url, "model": "a-vlm", "max_retries": 0, "num_concurrent_requests": 2}


def text_of(payload: dict[str, Any]) -> str:
    return payload["messages"][0]["content"][-1]["text"]


IMAGES = torch.arange(1, 4, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 8, 8)


def test_the_score_is_the_share_of_right_answers_whatever_their_spelling(tmp_path: Path) -> None:
    path = written(
        tmp_path / "q.jsonl",
        two_cats=[("How many?", "2"), ("Colour?", "light blue"), ("Cats?", "Yes"), ("Where?", "on the left")],
        a_dog=[("Dogs?", "yes")],
    )
    replies = {
        "How many?": '{"answer": "Two"}',
        "Colour?": 'It is {"answer": "Light blue."}',
        "Cats?": '{"answer": false}',
        "Where?": '{"answer": "on left"}',
        "Dogs?": '{"answer": "cats"}',
    }
    with CaptionServer(lambda payload: saying(replies[text_of(payload).split(" Answer")[0]])) as server:
        found = scorer(path, endpoint=endpoint(server))(IMAGES, ["two cats", "a dog", "two cats"])["vqa"]
    np.testing.assert_allclose(found, [0.75, 0, 0.75])
    assert len(server.requests) == 9 and "JSON alone" in text_of(server.requests[0][1])


def test_images_with_an_invalid_answer_or_without_questions_have_no_score_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "q.jsonl", a_cat=[("Cats?", "yes"), ("Red?", "no")], a_dog=[("Dogs?", "yes")])
    reply = {"Cats?": '{"answer": []}', "Red?": '{"answer": "no"}', "Dogs?": '{"answer": 1}'}
    with CaptionServer(lambda payload: saying(reply[text_of(payload).split(" Answer")[0]])) as server:
        found = scorer(path, endpoint=endpoint(server))(IMAGES, ["a cat", "a dog", "a bird"])["vqa"]
    np.testing.assert_array_equal(found, [np.nan, 0, np.nan])
    invalid, without = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert invalid.startswith(
        "reward `vqa`: 1 of 3 answers are missing or invalid; such images have no score; the first"
    )
    assert without.startswith("reward `vqa`: 1 of 3 images have no score, because the file has no questions for their")


def test_probabilities_give_the_expected_share_by_the_spellings_of_the_right_answer(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", two_cats=[("How many?", "two"), ("Red?", "Yes")])
    shares = {"How many?": {"2": 0.25, "Two": 0.5, "3": 0.25}, "Red?": {"no": 1.0}}
    with CaptionServer(lambda payload: choosing(shares[text_of(payload).split(" Answer")[0]])) as server:
        options = {"endpoint": endpoint(server), "read": "probabilities"}
        found = scorer(path, **options)(IMAGES[:1], ["two cats"])["vqa"]
    np.testing.assert_allclose(found, [(0.75 + 0) / 2])


def test_a_model_in_this_process_gives_the_softmax_of_a_plain_forward_pass(tmp_path: Path, chat_dir: Path) -> None:
    path = written(tmp_path / "q.jsonl", a_cat=[("a cat", "yes"), ("the dog", "2")])
    images = smooth_images(2)
    found = scorer(path, checkpoint=str(chat_dir), read="probabilities")(images, ["a cat", "a cat"])["vqa"]
    for image, score in zip(images, found, strict=True):
        shares = []
        for text, words in (("a cat", ("yes", "Yes", "YES")), ("the dog", ("2", "two"))):
            asked = f"{text} <unk> <unk> one <unk>"  # Answer in one word.
            softmax = first_token_softmax(chat_dir, [image], asked)
            shares.append(sum(softmax[token_of(word)].item() for word in words))
        assert score == pytest.approx(np.mean(shares), abs=1e-5)


def test_a_model_in_this_process_answers_in_json(tmp_path: Path) -> None:
    replies = [json.dumps({"answer": answer}, separators=(",", ":")) for answer in ("yes", "no", "cat", "2")]
    folder = build_llava(tmp_path / "llava", replies)
    net = LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        net.lm_head.weight[: -len(replies)] = 0  # only the replies can be the most probable token
        net.lm_head.weight[-len(replies) :] *= 50
        net.lm_head.weight[3] = net.lm_head.weight[-len(replies) :].mean(0)
    net.save_pretrained(folder)
    model, images = VisionLanguageModel(folder, max_tokens=1, key="k"), smooth_images(4)
    said = [json.loads(one.text)["answer"] for one in model(images, [Question("a cat", (n,)) for n in range(4)])]
    path = written(tmp_path / "q.jsonl", a_cat=[("a cat", said[0])])
    rewards = scorer(path, checkpoint=str(folder))
    rewards.rewards["vqa"].ask.max_tokens = 1
    rewards.rewards["vqa"]._question = lambda asked, number: Question(asked.question, (number,))
    found = rewards(images, ["a cat"] * 4)["vqa"]
    np.testing.assert_array_equal(found, [float(answer == said[0]) for answer in said])


def test_a_broken_file_is_refused_when_the_reward_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("{}\n")
    with pytest.raises(RewardError, match=r"^`rewards\.vqa\.questions` .*/q\.jsonl: 1 fault\n"):
        scorer(tmp_path / "q.jsonl", endpoint={"url": "http://127.0.0.1:9/v1", "model": "m"})


def test_a_model_writes_the_questions_of_a_prompt_and_invalid_ones_are_reported(tmp_path: Path) -> None:
    replies = {
        "two cats": 'Here: {"questions": [{"question": "How many cats?", "answer": "2", "kind": "count"}]}',
        "a dog": '{"questions": []}',
        "a bird": "no",
    }
    options = dict.fromkeys(("token_variable",)) | {"timeout_seconds": 5}
    with CaptionServer(lambda payload: saying(replies[text_of(payload).split("Prompt: ")[1]])) as server:
        path = tmp_path / "q.jsonl"
        num_written, cost, faults = write_questions([*replies], path, endpoint(server) | options)
    assert read_questions(path) == {"two cats": (VqaQuestion("How many cats?", "2", "count"),)}
    assert num_written == 1 and cost.startswith("3 requests")
    assert [fault.split(":")[0] for fault in faults] == ["  a dog", "  a bird"]
    with CaptionServer(lambda _: failing(401)) as server, pytest.raises(RewardError, match="none of 1 questions was"):
        write_questions(["a cat"], path, endpoint(server) | options)


def test_questions_are_appended_on_a_line_of_their_own_to_a_file_without_a_final_newline(tmp_path: Path) -> None:
    options = dict.fromkeys(("token_variable",)) | {"timeout_seconds": 5}
    reply = '{"questions": [{"question": "Cats?", "answer": "1"}]}'
    path = written(tmp_path / "q.jsonl", a_dog=[("Dogs?", "1")])
    path.write_text(path.read_text().rstrip("\n"))
    with CaptionServer(lambda _: saying(reply)) as server:
        write_questions(["a cat"], path, endpoint(server) | options)
        write_questions(["a cow"], path, endpoint(server) | options)
    assert [*read_questions(path)] == ["a dog", "a cat", "a cow"]
    assert "\n\n" not in path.read_text()


def test_a_file_that_cannot_be_written_is_refused_before_the_first_request(tmp_path: Path) -> None:
    options = dict.fromkeys(("token_variable",)) | {"timeout_seconds": 5}
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "none" / "q.jsonl", "No such file or directory"),
        (tmp_path / "file" / "q.jsonl", "Not a directory"),
    ):
        with CaptionServer(lambda _: saying("never asked")) as server:
            with pytest.raises(StoreError, match=rf"q\.jsonl: cannot be written: {reason}; "):
                write_questions(["a cat"], path, endpoint(server) | options)
            assert not server.requests

"""Answers of an endpoint: all kinds of server faults, probabilities of tokens, and answers that are kept."""

import base64
import contextlib
import json
import logging
import math
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_server import Answer as Reply
from caption_server import CaptionServer, choosing, failing, saying
from torch import Tensor

from cdpo_ray.dataflow.images import decode_png
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards import endpoint as endpoints
from cdpo_ray.rewards import kept_answers
from cdpo_ray.rewards.answers import Answer, Question
from cdpo_ray.rewards.endpoint import Endpoint
from cdpo_ray.rewards.kept_answers import KeptAnswers

TOKEN = "sk-a-secret-of-the-test"


def smooth_images(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, (32, 32)) * 255).to(torch.uint8)


def about_each(images: Tensor, text: str = "What is it?") -> list[Question]:
    return [Question(text, (number,)) for number in range(len(images))]


@pytest.fixture(autouse=True)
def no_long_waits(local_answers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MAX_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("TOKEN_OF_A_TEST", f" {TOKEN}\n")


KEY = "rewards.vlm_judge.endpoint"


def endpoint_of(url: str, **options: Any) -> Endpoint:
    given = {"model": "a-vlm", "token_variable": "TOKEN_OF_A_TEST", "timeout_seconds": 5, "max_retries": 2}
    given |= {"num_concurrent_requests": 1, "max_tokens": 9, "key": KEY}
    return Endpoint(url=url, **given | options)


def answers(url: str, images: Tensor, **options: Any) -> list[Answer]:
    return endpoint_of(url, **options)(images, about_each(images))


def image_of(payload: dict[str, Any]) -> Tensor:
    url = payload["messages"][0]["content"][0]["image_url"]["url"]
    return torch.tensor(decode_png(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def test_a_server_gets_each_image_unchanged_with_the_instruction_and_the_token() -> None:
    images = smooth_images(1)
    with CaptionServer(lambda _: saying("  a cat \n")) as server:
        assert answers(f"{server.url}/", images) == [Answer("a cat")]
    ((headers, payload),) = server.requests
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert torch.equal(image_of(payload), images[0])
    assert payload["messages"][0]["content"][1] == {"type": "text", "text": "What is it?"}
    assert {name: payload[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "a-vlm",
        "temperature": 0,
        "max_tokens": 9,
    }


def test_requests_run_in_parallel_up_to_the_limit_and_answers_keep_their_order() -> None:
    images = torch.arange(9, dtype=torch.uint8).reshape(9, 1, 1, 1).expand(9, 3, 4, 4)

    def slow(payload: dict[str, Any]) -> Reply:
        number = int(image_of(payload)[0, 0, 0])
        time.sleep(0.1 if number % 2 else 0.03)
        return saying(f"image {number}")

    with CaptionServer(slow) as server:
        found = answers(server.url, images, num_concurrent_requests=3)
    assert [answer.text for answer in found] == [f"image {number}" for number in range(9)]
    assert 2 <= server.most_at_once <= 3


def test_no_token_is_sent_unless_configured_even_if_netrc_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with CaptionServer(lambda _: saying("a cat")) as server:
        answers(server.url, smooth_images(1), token_variable=None, reuse=False)
        answers(server.url, smooth_images(1), reuse=False)
    assert [headers.get("Authorization") for headers, _ in server.requests] == [None, f"Bearer {TOKEN}"]


def test_a_busy_server_is_retried_with_a_bounded_delay() -> None:
    replies = iter([failing(503), failing(429, Retry_After="3600"), saying("a cat")])
    with CaptionServer(lambda _: next(replies)) as server:
        began = time.monotonic()
        assert answers(server.url, smooth_images(1)) == [Answer("a cat")]
    assert len(server.requests) == 3
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("status", "num_attempts"), [(503, 3), (401, 1), (404, 1), (302, 1)])
def test_only_transient_errors_are_retried_and_attempts_are_limited(
    status: int, num_attempts: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with CaptionServer(lambda _: failing(status, Location="/v1/elsewhere")) as server:
        asked = endpoint_of(server.url)
        found = asked(smooth_images(1), about_each(smooth_images(1)))
    assert found == [Answer(fault=f"{server.url}/chat/completions answered with status {status}")]
    assert len(server.requests) == num_attempts
    assert TOKEN not in f"{found}{caplog.text}{vars(asked)}"


def test_a_server_that_times_out_is_given_up_after_the_retries() -> None:
    def sleep(_: object) -> Reply:
        time.sleep(1)
        return saying("too late")

    with CaptionServer(sleep) as server:
        (answer,) = answers(server.url, smooth_images(1), timeout_seconds=0.3, max_retries=1)
    assert answer.fault == f"{server.url}/chat/completions did not answer within 0.3 s"
    assert len(server.requests) == 2


@pytest.mark.parametrize("begins_with", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: ", b""])
def test_fault_56_a_server_that_sends_single_bytes_is_given_up_at_the_timeout(begins_with: bytes) -> None:
    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.sendall(begins_with)
            while not ended.wait(0.05):
                connection.sendall(b"x" if begins_with else b"H")

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listening.accept()[0])
                threading.Thread(target=drip, args=(connections[-1],), daemon=True).start()

    ended, connections = threading.Event(), list[socket.socket]()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        began = time.monotonic()
        found = answers(url, smooth_images(2), timeout_seconds=0.3, max_retries=1, num_concurrent_requests=2)
        ended.set()
    assert found == [Answer(fault=f"{url}/chat/completions did not answer within 0.3 s")] * 2
    assert 0.6 < time.monotonic() - began < 5
    assert len(connections) == 4


def test_an_unreachable_server_is_a_fault_without_traceback() -> None:
    with CaptionServer(lambda _: saying("")) as server:
        pass
    (answer,) = answers(server.url, smooth_images(1), max_retries=1)
    assert "did not answer: " in answer.fault and TOKEN not in answer.fault


def test_a_response_beyond_the_size_limit_is_not_read_to_its_end() -> None:
    with CaptionServer(lambda _: saying("a" * 30_000_000)) as server:
        assert answers(server.url, smooth_images(1)) == [
            Answer(fault=f"{server.url}/chat/completions answered with more than 1000000 bytes")
        ]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ((200, {}, b"<html>"), "did not answer with a chat completion"),
        ((200, {}, b"\xff"), "did not answer with a chat completion"),
        ((200, {}, b'{"choices": []}'), "did not answer with a chat completion"),
        ((200, {}, b'{"error": "no"}'), "did not answer with a chat completion"),
        ((200, {}, b"3"), "did not answer with a chat completion"),
        (saying(None), "did not answer with a chat completion"),
        (saying(" \n"), "answered with an empty text"),
    ],
)
def test_an_invalid_response_is_a_fault_of_that_image(answer: Reply, fault: str) -> None:
    with CaptionServer(lambda _: answer) as server:
        assert answers(server.url, smooth_images(1)) == [Answer(fault=f"{server.url}/chat/completions {fault}")]


@pytest.mark.parametrize(("value", "fault"), [("", "environment variable is not set"), ("a\nb", "holds characters")])
def test_an_invalid_token_is_refused_but_not_printed(value: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_A_TEST", value)
    with pytest.raises(RewardError, match=f"`{KEY}.token_variable` TOKEN_OF_A_TEST: {fault}"):
        endpoint_of("http://127.0.0.1:9/v1")


def test_several_images_are_sent_in_the_order_of_the_question() -> None:
    images = smooth_images(3)
    with CaptionServer(lambda _: saying("the second")) as server:
        endpoint_of(server.url)(images, [Question("Which?", (2, 0))])
    content = server.requests[0][1]["messages"][0]["content"]
    sent = [part["image_url"]["url"].removeprefix("data:image/png;base64,") for part in content[:-1]]
    shown = [torch.tensor(decode_png(base64.b64decode(each))) for each in sent]
    assert [torch.equal(one, images[number]) for one, number in zip(shown, (2, 0), strict=True)] == [True, True]
    assert content[-1]["text"] == "Which?"


CHOICE = Question("Is it?", (0,), (("yes",), ("no",), ("2", "two")))


def test_probabilities_are_those_of_the_first_token_summed_over_its_spellings() -> None:
    tokens = {"Yes": 0.5, " yes": 0.125, "NO": 0.25, "two": 0.0625, "2": 0.03125, "nothing": 0.03125}
    with CaptionServer(lambda _: choosing(tokens)) as server:
        (answer,) = endpoint_of(server.url)(smooth_images(1), [CHOICE])
    assert answer.probabilities == pytest.approx((0.625, 0.25, 0.09375)) and not answer.fault
    payload = server.requests[0][1]
    assert (payload["logprobs"], payload["top_logprobs"], payload["max_tokens"]) == (True, 20, 1)


@pytest.mark.parametrize(
    "reply",
    [
        saying("yes"),
        choosing({}),
        choosing({"yes": math.nan}),
        choosing({"yes": 7.0}),
        (200, {}, json.dumps({"choices": [{"message": {"content": "yes"}, "logprobs": [3]}]}).encode()),
    ],
)
def test_an_answer_without_valid_logprobs_is_a_fault_with_a_remedy(reply: Reply) -> None:
    with CaptionServer(lambda _: reply) as server:
        (answer,) = endpoint_of(server.url)(smooth_images(1), [CHOICE])
    assert answer.fault == f"{server.url}/chat/completions answered without logprobs; set `read: json`"


def test_an_answer_is_paid_for_once_even_by_another_process_unless_a_second_scoring_asks_again() -> None:
    images = smooth_images(2)
    with CaptionServer(lambda _: saying("a cat", prompt_tokens=300, completion_tokens=2)) as server:
        first = endpoint_of(server.url)
        assert first(images, about_each(images)) == [Answer("a cat")] * 2
        assert first.cost == "2 requests with 600 tokens, answered with 4 tokens; 0 answers were known"
        other = endpoint_of(server.url)  # reads what the first wrote, as another process would
        assert other(images, about_each(images)) == [Answer("a cat")] * 2
        assert other.cost == "0 requests with 0 tokens, answered with 0 tokens; 2 answers were known"
        assert len(server.requests) == 2
        endpoint_of(server.url, reuse=False)(images, about_each(images))
        assert len(server.requests) == 4


def test_another_image_question_choice_model_or_length_is_asked() -> None:
    images = smooth_images(2)
    with CaptionServer(lambda payload: choosing({"yes": 1.0}) if "logprobs" in payload else saying("yes")) as server:
        question = Question("Is it?", (0,))
        asked = [question, question._replace(text="Was it?"), question._replace(images=(1,)), CHOICE]
        asked += [question._replace(images=(0, 1)), question._replace(images=(1, 0)), question]
        endpoint_of(server.url)(images, asked)
        for other in ({"model": "b"}, {"max_tokens": 10}):
            endpoint_of(server.url, **other)(images, [question])
    assert len(server.requests) == 8, "all but the repeated question"


def test_a_fault_is_not_kept() -> None:
    replies = iter([failing(401), saying("a cat")])
    with CaptionServer(lambda _: next(replies)) as server:
        assert answers(server.url, smooth_images(1))[0].fault
        assert answers(server.url, smooth_images(1)) == [Answer("a cat")]


def digest_of(number: int) -> str:
    return f"{number:064x}"


def test_concurrent_writers_lose_no_answer_and_broken_lines_are_ignored() -> None:
    writers = [KeptAnswers() for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        for number in range(400):
            threads.submit(writers[number % 4].add, digest_of(number), Answer("é" * number, "", (0.1, number)))
    with (kept_answers.KEPT_DIR / "answers.jsonl").open("ab") as file:
        file.write(b'["torn", "a\n[1]\nnull\n' + b"[" * 100_000 + b'\n["%b", "y", ["z"]]\n' % (b"x" * 64))
    KeptAnswers().add(digest_of(500), Answer("last"))
    found = KeptAnswers()
    assert [found.get(digest_of(number)) for number in range(400)] == [
        Answer("é" * number, "", (0.1, number)) for number in range(400)
    ]
    assert found.get(digest_of(500)) == Answer("last") and found.get("x" * 64) is None


def test_kept_answers_are_bounded_and_the_newer_half_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_answers, "MAX_BYTES", 1000)
    for number in range(100):
        KeptAnswers().add(digest_of(number), Answer("a" * 50))
    found = KeptAnswers()
    assert [found.get(digest_of(number)) is not None for number in range(100)].index(True) < 95
    assert all(found.get(digest_of(number)) for number in range(95, 100)) and found.get(digest_of(0)) is None
    assert sum(path.stat().st_size for path in kept_answers.KEPT_DIR.iterdir()) < 2500


def test_answers_are_given_also_if_they_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(kept_answers, "KEPT_DIR", tmp_path / "file" / "answers")
    with CaptionServer(lambda _: saying("a cat")) as server:
        assert answers(server.url, smooth_images(1)) == [Answer("a cat")]

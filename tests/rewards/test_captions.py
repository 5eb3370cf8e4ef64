"""Captions: a local model against plain greedy decoding; an endpoint with all kinds of server faults."""

import base64
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from caption_server import Answer, CaptionServer, failing, saying
from tiny_captioners import BERT_MARKS, WORDS, build_blip, build_llava
from torch import Tensor
from transformers import BlipForConditionalGeneration, LlavaForConditionalGeneration

from cdpo_ray.dataflow.images import decode_png
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards import captions
from cdpo_ray.rewards.captions import EndpointCaptioner, LocalCaptioner

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOKEN = "sk-a-secret-of-the-test"


def smooth_images(count: int) -> Tensor:
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, (32, 32)) * 255).to(torch.uint8)


def prepared(image: Tensor) -> Tensor:
    return ((image / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])[None]


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
    found = LocalCaptioner(folder, instruction="not used", max_tokens=8, key="k")(images)
    assert [caption.text for caption in found] == expected
    assert len(set(expected)) > 2


def test_a_chat_model_gets_the_instruction_with_each_image_and_only_its_reply_is_kept(tmp_path: Path) -> None:
    folder, images = build_llava(tmp_path / "llava"), smooth_images(5)
    net = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "USER", "ASSISTANT", *WORDS]
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
    found = LocalCaptioner(folder, instruction="a red bird", max_tokens=8, key="k")(images)
    assert [caption.text for caption in found] == expected
    assert len(set(expected)) > 2


@pytest.fixture(autouse=True)
def no_long_waits_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "MAX_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TOKEN_OF_A_TEST", f" {TOKEN}\n")


def endpoint_captioner(url: str, **options: Any) -> EndpointCaptioner:
    given = {"model": "a-vlm", "token_variable": "TOKEN_OF_A_TEST", "timeout_seconds": 5, "max_retries": 2}
    given |= {"num_concurrent_requests": 1, "instruction": "What is it?", "max_tokens": 9}
    return EndpointCaptioner(url=url, **given | options)


def image_of(payload: dict[str, Any]) -> Tensor:
    url = payload["messages"][0]["content"][0]["image_url"]["url"]
    return torch.tensor(decode_png(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def test_a_server_gets_each_image_unchanged_with_the_instruction_and_the_token() -> None:
    images = smooth_images(1)
    with CaptionServer(lambda _: saying("  a cat \n")) as server:
        assert endpoint_captioner(f"{server.url}/")(images) == [("a cat", "")]
    ((headers, payload),) = server.requests
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert torch.equal(image_of(payload), images[0])
    assert payload["messages"][0]["content"][1] == {"type": "text", "text": "What is it?"}
    assert {name: payload[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "a-vlm",
        "temperature": 0,
        "max_tokens": 9,
    }


def test_requests_run_in_parallel_up_to_the_limit_and_captions_keep_their_order() -> None:
    images = torch.arange(9, dtype=torch.uint8).reshape(9, 1, 1, 1).expand(9, 3, 4, 4)

    def slow(payload: dict[str, Any]) -> Answer:
        number = int(image_of(payload)[0, 0, 0])
        time.sleep(0.1 if number % 2 else 0.03)
        return saying(f"image {number}")

    with CaptionServer(slow) as server:
        found = endpoint_captioner(server.url, num_concurrent_requests=3)(images)
    assert [caption.text for caption in found] == [f"image {number}" for number in range(9)]
    assert 2 <= server.most_at_once <= 3


def test_no_token_is_sent_unless_configured_even_if_netrc_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with CaptionServer(lambda _: saying("a cat")) as server:
        endpoint_captioner(server.url, token_variable=None)(smooth_images(1))
        endpoint_captioner(server.url)(smooth_images(1))
    assert [headers.get("Authorization") for headers, _ in server.requests] == [None, f"Bearer {TOKEN}"]


def test_a_busy_server_is_retried_with_a_bounded_delay() -> None:
    answers = iter([failing(503), failing(429, Retry_After="3600"), saying("a cat")])
    with CaptionServer(lambda _: next(answers)) as server:
        began = time.monotonic()
        assert endpoint_captioner(server.url)(smooth_images(1)) == [("a cat", "")]
    assert len(server.requests) == 3
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("status", "num_attempts"), [(503, 3), (401, 1), (404, 1), (302, 1)])
def test_only_transient_errors_are_retried_and_attempts_are_limited(
    status: int, num_attempts: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with CaptionServer(lambda _: failing(status, Location="/v1/elsewhere")) as server:
        captioner = endpoint_captioner(server.url)
        found = captioner(smooth_images(1))
    assert found == [("", f"{server.url}/chat/completions answered with status {status}")]
    assert len(server.requests) == num_attempts
    assert TOKEN not in f"{found}{caplog.text}{vars(captioner)}"


def test_a_server_that_times_out_is_given_up_after_the_retries() -> None:
    def sleep(_: object) -> Answer:
        time.sleep(1)
        return saying("too late")

    with CaptionServer(sleep) as server:
        (caption,) = endpoint_captioner(server.url, timeout_seconds=0.3, max_retries=1)(smooth_images(1))
    assert caption.fault == f"{server.url}/chat/completions did not answer within 0.3 s"
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
        found = endpoint_captioner(url, timeout_seconds=0.3, max_retries=1, num_concurrent_requests=2)(smooth_images(2))
        ended.set()
    assert found == [("", f"{url}/chat/completions did not answer within 0.3 s")] * 2
    assert 0.6 < time.monotonic() - began < 5
    assert len(connections) == 4


def test_an_unreachable_server_is_a_fault_without_traceback() -> None:
    with CaptionServer(lambda _: saying("")) as server:
        pass
    (caption,) = endpoint_captioner(server.url, max_retries=1)(smooth_images(1))
    assert "did not answer: " in caption.fault and TOKEN not in caption.fault


def test_a_response_beyond_the_size_limit_is_not_read_to_its_end() -> None:
    with CaptionServer(lambda _: saying("a" * 30_000_000)) as server:
        assert endpoint_captioner(server.url)(smooth_images(1)) == [
            ("", f"{server.url}/chat/completions answered with more than 1000000 bytes")
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
        (saying(" \n"), "answered with an empty caption"),
    ],
)
def test_an_invalid_response_is_a_fault_of_that_image(answer: Answer, fault: str) -> None:
    with CaptionServer(lambda _: answer) as server:
        assert endpoint_captioner(server.url)(smooth_images(1)) == [("", f"{server.url}/chat/completions {fault}")]


@pytest.mark.parametrize(("value", "fault"), [("", "environment variable is not set"), ("a\nb", "holds characters")])
def test_an_invalid_token_is_refused_but_not_printed(value: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_OF_A_TEST", value)
    with pytest.raises(RewardError, match=f"`rewards.vlm_alignment.endpoint.token_variable` TOKEN_OF_A_TEST: {fault}"):
        endpoint_captioner("http://127.0.0.1:9/v1")

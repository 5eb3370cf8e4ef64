"""Questions about images -> answers of a model behind an OpenAI-compatible endpoint, each paid for once."""

import base64
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import requests
from numpy.typing import NDArray
from requests.adapters import HTTPAdapter
from torch import Tensor

from cdpo_ray.dataflow.images import encode_png
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.answers import Answer, Choices, Question
from cdpo_ray.rewards.kept_answers import KeptAnswers

log = logging.getLogger(__name__)
MAX_RESPONSE_BYTES = 1_000_000
TRANSIENT_STATUSES = (429, 500, 502, 503, 504)
"""HTTP statuses of a server that is busy or starting; the request is retried."""
MAX_WAIT_SECONDS = 60
"""Maximum delay between two attempts, even if ``Retry-After`` is longer."""
NUM_TOP_TOKENS = 20
"""Number of first tokens whose probabilities are requested: the most that the interface allows."""


class Endpoint:
    """Model of a server: one request per question, several in parallel, retried after transient errors.

    Answers are kept on this machine, see `KeptAnswers`. The number of requests and of tokens is logged.

    Args:
        url: base URL, including ``/v1``.
        model: name of the model on the server.
        token_variable: environment variable on this machine with the server's token; `None`: no token.
        timeout_seconds: timeout of an attempt, from its start to the end of the response.
        max_retries: maximum number of retries after the first attempt.
        num_concurrent_requests: maximum number of parallel requests.
        max_tokens: maximum number of tokens of a text.
        key: config key of the endpoint, for errors.
        reuse: use kept answers; a second scoring, which measures the noise of answers, must not.

    Raises:
        RewardError: if the variable is not set, or is not a valid token.
    """

    def __init__(
        self,
        *,
        url: str,
        model: str,
        token_variable: str | None,
        timeout_seconds: float,
        max_retries: int,
        num_concurrent_requests: int,
        max_tokens: int,
        key: str,
        reuse: bool = True,
    ) -> None:
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.model, self.max_tokens = model, max_tokens
        self.timeout_seconds, self.num_concurrent_requests = timeout_seconds, num_concurrent_requests
        self.max_retries = max_retries
        self.kept = KeptAnswers() if reuse else None
        self.counts = Counter[str]()
        self._lock = threading.Lock()
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=num_concurrent_requests))
        token = _token(token_variable, f"`{key}.token_variable`")

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if token:
                request.headers["Authorization"] = f"Bearer {token}"
            return request

        self.session.auth = authorize  # a session header would be overridden by ~/.netrc

    def __call__(self, images: Tensor, questions: Sequence[Question]) -> list[Answer]:
        shown = sorted({number for question in questions for number in question.images})
        pictures = {number: _Picture(images[number].cpu().numpy()) for number in shown}

        def answered(question: Question) -> Answer:
            return self._answered(question, [pictures[number] for number in question.images])

        with ThreadPoolExecutor(self.num_concurrent_requests) as threads:
            answers = list(threads.map(answered, questions))
        log.info("%s: so far %s", self.url, self.cost)
        return answers

    @property
    def cost(self) -> str:
        """Number of requests and tokens so far, as text."""
        counts = self.counts
        return (
            f"{counts['requests']:,} requests with {counts['prompt_tokens']:,} tokens, answered with"
            f" {counts['completion_tokens']:,} tokens; {counts['kept']:,} answers were known"
        )

    def _answered(self, question: Question, pictures: Sequence["_Picture"]) -> Answer:
        asked = [self.url, self.model, question.text, question.choices, self.max_tokens]
        digest = hashlib.sha256(json.dumps([*asked, *(picture.sha256 for picture in pictures)]).encode()).hexdigest()
        if self.kept and (known := self.kept.get(digest)) and len(known.probabilities) == len(question.choices):
            self._count(kept=1)
            return known
        answer = self._asked(question, pictures)
        if self.kept and not answer.fault:
            self.kept.add(digest, answer)
        return answer

    def _asked(self, question: Question, pictures: Sequence["_Picture"]) -> Answer:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": picture.data_url}} for picture in pictures
        ]
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        if question.choices:
            payload |= {"max_tokens": 1, "logprobs": True, "top_logprobs": NUM_TOP_TOKENS}
        for wait in [*(0.5 * 2**number for number in range(self.max_retries)), None]:
            try:
                answer, retry_after = _with_timeout(
                    self.timeout_seconds, lambda: self._attempt(payload, question.choices)
                )
            except TimeoutError:
                answer = Answer(fault=f"{self.url} did not answer within {self.timeout_seconds:g} s")
                retry_after = 0.0
            if wait is None or retry_after is None:
                break
            time.sleep(min(MAX_WAIT_SECONDS, max(wait, retry_after)))
        return answer

    def _attempt(self, payload: dict[str, Any], choices: Choices) -> tuple[Answer, float | None]:
        """Answer from one attempt, and the minimum delay in seconds before a retry; `None`: a retry is pointless."""
        self._count(requests=1)
        try:
            with self.session.post(
                self.url, json=payload, timeout=self.timeout_seconds, stream=True, allow_redirects=False
            ) as response:
                if response.status_code != requests.codes.ok:
                    is_transient = response.status_code in TRANSIENT_STATUSES
                    after = response.headers.get("Retry-After", "")
                    fault = f"{self.url} answered with status {response.status_code}"
                    return Answer(fault=fault), (float(after) if after.isdecimal() else 0.0) if is_transient else None
                body = bytearray()
                for part in response.iter_content(1 << 16):
                    body += part
                    if len(body) > MAX_RESPONSE_BYTES:
                        fault = f"{self.url} answered with more than {MAX_RESPONSE_BYTES} bytes"
                        return Answer(fault=fault), None
            found = json.loads(body)
            choice = found["choices"][0]
            text = choice["message"]["content"]
            text = "" if choices and text is None else text.strip()
        except requests.Timeout:
            raise TimeoutError from None
        except requests.RequestException as error:
            return Answer(fault=f"{self.url} did not answer: {str(error).splitlines()[0]}"), 0.0
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return Answer(fault=f"{self.url} did not answer with a chat completion"), None
        self._count_tokens(found.get("usage"))
        if choices:
            probabilities = _probabilities(choice.get("logprobs"), choices)
            if probabilities is None:
                return Answer(fault=f"{self.url} answered without logprobs; set `read: json`"), None
            return Answer(probabilities=probabilities), None
        return Answer(text) if text else Answer(fault=f"{self.url} answered with an empty text"), None

    def _count(self, **counts: int) -> None:
        with self._lock:
            self.counts.update(counts)

    def _count_tokens(self, usage: Any) -> None:
        if isinstance(usage, dict):
            given = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
            self._count(**{name: count for name, count in given.items() if isinstance(count, int) and count >= 0})


class _Picture:
    """An image as PNG, encoded when first needed, and the SHA-256 of its pixels."""

    def __init__(self, pixels: NDArray[Any]) -> None:
        self.pixels, self._url = pixels, ""
        self.sha256 = hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()

    @property
    def data_url(self) -> str:
        self._url = self._url or f"data:image/png;base64,{base64.b64encode(encode_png(self.pixels)).decode()}"
        return self._url


def _probabilities(logprobs: Any, choices: Choices) -> tuple[float, ...] | None:
    """Probability of each choice among the most probable first tokens; `None`: the server lists none."""
    try:
        listed = [(str(top["token"]), float(top["logprob"])) for top in logprobs["content"][0]["top_logprobs"]]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    if not listed or any(math.isnan(logprob) or logprob > 1e-3 for _, logprob in listed):
        return None
    by_spelling: defaultdict[str, float] = defaultdict(float)
    for token, logprob in listed:
        by_spelling[token.strip().casefold()] += math.exp(logprob)
    return tuple(sum(by_spelling[spelling] for spelling in spellings) for spellings in choices)


def _with_timeout(seconds: float, call: Callable[[], Any]) -> Any:
    """Return value of a call; a call that takes longer is abandoned in a daemon thread.

    The timeout of `requests` limits one read: a server that sends single bytes would never reach it.

    Raises:
        TimeoutError: if the call takes longer.
    """
    found = Future[Any]()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(seconds)


def _token(variable: str | None, key: str) -> str:
    if variable is None:
        return ""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise RewardError(f"{key} {variable}: environment variable is not set on this machine, or is empty; set it")
    if not (token.isascii() and token.isprintable()):  # else the HTTP client's error would print it
        raise RewardError(f"{key} {variable}: holds characters that are invalid in a token; correct it")
    return token

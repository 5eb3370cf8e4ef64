"""Images -> captions by a vision-language model, in this process or behind an OpenAI-compatible endpoint."""

import base64
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import requests
import torch
from PIL import Image
from requests.adapters import HTTPAdapter
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from cdpo_ray.dataflow.images import encode_png
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.weights import from_folder, model_from_folder

MAX_RESPONSE_BYTES = 1_000_000
TRANSIENT_STATUSES = (429, 500, 502, 503, 504)
"""HTTP statuses of a server that is busy or starting; the request is retried."""
MAX_WAIT_SECONDS = 60
"""Maximum delay between two attempts, even if ``Retry-After`` is longer."""


class Caption(NamedTuple):
    """Caption of an image; if empty, ``fault`` is the reason."""

    text: str
    fault: str = ""


class LocalCaptioner:
    """Vision-language model of transformers on the device; greedy decoding, so captions are deterministic.

    Args:
        folder: folder with processor, configuration and safetensors weights.
        instruction: prompt of a chat model; not used by a model without a chat template.
        max_tokens: maximum number of tokens of a caption.
        key: config key to name in errors.

    Raises:
        RewardError: if the folder cannot be loaded.
    """

    def __init__(self, folder: Path, *, instruction: str = "", max_tokens: int, key: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor: Any = from_folder(AutoProcessor, folder, key=key)
        model: Any = model_from_folder(AutoModelForImageTextToText, folder, key=key, dtype="auto")
        self.model = model.eval().to(self.device)
        self.processor.tokenizer.padding_side = "left"  # new tokens are appended on the right
        self.instruction, self.max_tokens = instruction, max_tokens

    @torch.no_grad()
    def __call__(self, images: Tensor, instructions: Sequence[str] | None = None) -> list[Caption]:
        """Captions of uint8 ``[image, 3, height, width]``, each by its own instruction if some are given."""
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        inputs = self._inputs(pictures, instructions or [self.instruction] * len(pictures)).to(
            self.device, self.model.dtype
        )
        tokens = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_tokens)
        if "input_ids" in inputs and not self.model.config.is_encoder_decoder:
            tokens = tokens[:, inputs["input_ids"].shape[1] :]  # the output repeats the input
        return [
            Caption(text) if (text := decoded.strip()) else Caption("", "the model returned an empty caption")
            for decoded in self.processor.batch_decode(tokens, skip_special_tokens=True)
        ]

    def _inputs(self, pictures: Sequence[Image.Image], instructions: Sequence[str]) -> Any:
        if self.processor.chat_template is None:
            return self.processor(images=list(pictures), return_tensors="pt")
        chats = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instruction}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for instruction in instructions
        ]
        bos = self.processor.tokenizer.bos_token
        has_bos = bool(bos) and chats[0].startswith(bos)
        return self.processor(
            text=chats,
            images=[[picture] for picture in pictures],
            add_special_tokens=not has_bos,  # no second start token
            padding=True,
            return_tensors="pt",
        )


class EndpointCaptioner:
    """Model of a server: one request per image, several in parallel, retried after transient errors.

    Args:
        url: base URL, including ``/v1``.
        model: name of the model on the server.
        token_variable: environment variable on this machine with the server's token; `None`: no token.
        timeout_seconds: timeout of an attempt, from its start to the end of the response.
        max_retries: maximum number of retries after the first attempt.
        num_concurrent_requests: maximum number of parallel requests.
        instruction: prompt of the model.
        max_tokens: maximum number of tokens of a caption.

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
        instruction: str,
        max_tokens: int,
    ) -> None:
        self.url = f"{url.rstrip('/')}/chat/completions"
        self.model, self.instruction, self.max_tokens = model, instruction, max_tokens
        self.timeout_seconds, self.num_concurrent_requests = timeout_seconds, num_concurrent_requests
        self.max_retries = max_retries
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=num_concurrent_requests))
        token = _token(token_variable)

        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if token:
                request.headers["Authorization"] = f"Bearer {token}"
            return request

        self.session.auth = authorize  # a session header would be overridden by ~/.netrc

    def __call__(self, images: Tensor) -> list[Caption]:
        with ThreadPoolExecutor(self.num_concurrent_requests) as threads:
            return list(threads.map(self._caption, map(encode_png, images.cpu().numpy())))

    def _caption(self, png: bytes) -> Caption:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}}
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": self.instruction}]}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        for wait in [*(0.5 * 2**number for number in range(self.max_retries)), None]:
            try:
                caption, retry_after = _with_timeout(self.timeout_seconds, lambda: self._attempt(payload))
            except TimeoutError:
                caption, retry_after = Caption("", f"{self.url} did not answer within {self.timeout_seconds:g} s"), 0.0
            if wait is None or retry_after is None:
                break
            time.sleep(min(MAX_WAIT_SECONDS, max(wait, retry_after)))
        return caption

    def _attempt(self, payload: dict[str, Any]) -> tuple[Caption, float | None]:
        """Caption from one attempt, and the minimum delay in seconds before a retry; `None`: a retry is pointless."""
        try:
            with self.session.post(
                self.url, json=payload, timeout=self.timeout_seconds, stream=True, allow_redirects=False
            ) as response:
                if response.status_code != requests.codes.ok:
                    is_transient = response.status_code in TRANSIENT_STATUSES
                    after = response.headers.get("Retry-After", "")
                    fault = f"{self.url} answered with status {response.status_code}"
                    return Caption("", fault), (float(after) if after.isdecimal() else 0.0) if is_transient else None
                body = bytearray()
                for part in response.iter_content(1 << 16):
                    body += part
                    if len(body) > MAX_RESPONSE_BYTES:
                        return Caption("", f"{self.url} answered with more than {MAX_RESPONSE_BYTES} bytes"), None
            text = json.loads(body)["choices"][0]["message"]["content"].strip()
        except requests.Timeout:
            raise TimeoutError from None
        except requests.RequestException as error:
            return Caption("", f"{self.url} did not answer: {str(error).splitlines()[0]}"), 0.0
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return Caption("", f"{self.url} did not answer with a chat completion"), None
        return Caption(text) if text else Caption("", f"{self.url} answered with an empty caption"), None


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


def _token(variable: str | None) -> str:
    if variable is None:
        return ""
    key = "`rewards.vlm_alignment.endpoint.token_variable`"
    token = os.environ.get(variable, "").strip()
    if not token:
        raise RewardError(f"{key} {variable}: environment variable is not set on this machine, or is empty; set it")
    if not (token.isascii() and token.isprintable()):  # else the HTTP client's error would print it
        raise RewardError(f"{key} {variable}: holds characters that are invalid in a token; correct it")
    return token

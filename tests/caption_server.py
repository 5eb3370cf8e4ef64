"""A local caption server whose answers a test chooses."""

import contextlib
import json
import math
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Answer = tuple[int, dict[str, str], bytes]


def saying(caption: object, **usage: int) -> Answer:
    """Answer with a chat completion."""
    body = {"choices": [{"message": {"role": "assistant", "content": caption}}], "usage": usage}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def choosing(probabilities: dict[str, float]) -> Answer:
    """Answer with the probabilities of the first token."""
    top = [{"token": token, "logprob": math.log(share) if share else -9999} for token, share in probabilities.items()]
    message = {"role": "assistant", "content": next(iter(probabilities), "")}
    body = {"choices": [{"message": message, "logprobs": {"content": [{"top_logprobs": top}]}}]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def failing(status: int, **headers: str) -> Answer:
    """Answer with an error status."""
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, b"no"


class CaptionServer:
    """Context manager that answers ``/v1/chat/completions`` on a free port.

    Args:
        answer: function from the request's JSON to status, headers and body.

    Attributes:
        requests: headers and JSON of each request, in order of arrival.
        most_at_once: maximum number of concurrent requests.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.most_at_once = 0
        at_once, lock, server = 0, threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal at_once
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    at_once += 1
                    server.most_at_once = max(server.most_at_once, at_once)
                    server.requests.append((dict(self.headers), question))
                status, headers, body = answer(question) if self.path == "/v1/chat/completions" else failing(404)
                with lock:
                    at_once -= 1
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client may have disconnected
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

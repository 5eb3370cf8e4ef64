"""Pages served to a browser on the same machine."""

from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = "127.0.0.1"
OWN_NAMES = (LOOPBACK, "localhost")
"""Host names of requests that are answered: another one is a web site that resolves its name to this machine."""
TIMEOUT_SECONDS = 30.0  # of a connection, so that silent ones do not collect


@dataclass(frozen=True)
class Answer:
    """Answer to a request.

    Attributes:
        kind: MIME type.
        policy: content security policy of the answer.
    """

    content: bytes
    kind: str
    policy: str


class PageServer(ThreadingHTTPServer):
    """HTTP server on the loopback interface.

    Args:
        answer: takes the path of a request and returns the answer; `None`: there is no such page. No path may be used
            as the path of a file.
        port: 0: a free port.

    Raises:
        OSError: the port is in use, or needs privileges.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[str], Answer | None], *, port: int = 0) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.answer = answer

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = TIMEOUT_SECONDS

    def do_GET(self) -> None:
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if name not in OWN_NAMES:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return
        answer = self.server.answer(urlsplit(self.path).path)
        if answer is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        self._send(HTTPStatus.OK, answer)

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(status, Answer(f"{status.value} {status.phrase}\n".encode(), "text/plain", "default-src 'none'"))

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": f"{answer.kind}; charset=utf-8",
            "Content-Length": str(len(answer.content)),
            "Content-Security-Policy": f"{answer.policy}; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for header, value in headers.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def version_string(self) -> str:
        return "cdpo"

    def log_message(self, format: str, *values: Any) -> None:
        """Print nothing: requests come every few seconds."""

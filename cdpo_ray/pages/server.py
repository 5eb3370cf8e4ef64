"""Pages served to a browser on the same machine."""

import hmac
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from cdpo_ray.errors import printable

log = logging.getLogger(__name__)
LOOPBACK = "127.0.0.1"
OWN_NAMES = (LOOPBACK, "localhost")
"""Host names of requests that are answered: another one is a web site that resolves its name to this machine."""
TIMEOUT_SECONDS = 30.0  # of a connection, so that silent ones do not collect
MAX_BODY_BYTES = 4096
JSON = "application/json"


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
    status: HTTPStatus = HTTPStatus.OK


class PageServer(ThreadingHTTPServer):
    """HTTP server on the loopback interface.

    Args:
        answer: takes the path of a GET request and returns the answer; `None`: there is no such page. No path may be
            used as the path of a file.
        accept: takes the path and the JSON body of a POST request, of at most `MAX_BODY_BYTES`; `None`: POST requests
            are refused. Only a page of this server can send them.
        token: secret first part of every path, without which no request is answered; empty: there is none.
        port: 0: a free port.

    Raises:
        OSError: the port is in use, or needs privileges.
    """

    daemon_threads = True

    def __init__(
        self,
        answer: Callable[[str], Answer | None],
        *,
        accept: Callable[[str, bytes], Answer | None] = lambda path, body: None,
        token: str = "",
        port: int = 0,
    ) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.answer = answer
        self.accept = accept
        self.token = token

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a browser that closed its connection, as by a reload; a bug of an answer is one line."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            log.warning("a request failed: %s: %s", type(error).__name__, printable(str(error)))

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/{f'{self.token}/' if self.token else ''}"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = TIMEOUT_SECONDS

    def do_GET(self) -> None:
        self._answer(self.server.answer)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Origin") != f"http://{self.headers.get('Host')}":  # browsers always send it
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.headers.get("Content-Type") != JSON:  # a form of another site cannot send this type
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif not (length.isascii() and length.isdecimal() and len(length) < 10 and int(length) <= MAX_BODY_BYTES):
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            self._answer(lambda path: self.server.accept(path, self.rfile.read(int(length))))

    def _answer(self, answer: Callable[[str], Answer | None]) -> None:
        """Answer a request for this host whose path begins with the token."""
        name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if name not in OWN_NAMES:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = urlsplit(self.path).path
        if self.server.token:
            token, _, path = path.removeprefix("/").partition("/")
            path = f"/{path}"
            if not hmac.compare_digest(token.encode(errors="replace"), self.server.token.encode()):
                self._refuse(HTTPStatus.NOT_FOUND)
                return
        found = answer(path)
        if found is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        self._send(found)

    def _refuse(self, status: HTTPStatus) -> None:
        content = f"{status.value} {status.phrase}\n".encode()
        self._send(Answer(content, "text/plain", "default-src 'none'", status))

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.kind if answer.kind.startswith("image/") else f"{answer.kind}; charset=utf-8",
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

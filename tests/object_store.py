"""A real S3 server for tests: moto on loopback, which can be made to fail, or another one by its endpoint."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Response

from cdpo_ray.store import storage_path

ENDPOINT = "CDPO_TEST_S3_ENDPOINT"
"""Environment variable with the URL of a server that has an empty bucket named `bucket`; credentials as for AWS."""
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
}
Fault = Callable[[str, str], Response | None]
"""Operation ("get", "head", "list", "put", "copy", "delete" or "delete many") and key -> response to send instead."""


class _Handler(WSGIRequestHandler):
    def handle_expect_100(self) -> bool:
        """werkzeug answers `100 Continue` itself; a second one would end aiohttp's wait for the response."""
        return True


class S3Server:
    """An S3 server in this process.

    Attributes:
        fault: called before each request.
        requests: operation and key of each request since the last `clear`.
    """

    def __init__(self) -> None:
        self.fault: Fault = lambda operation, key: None
        self.requests: list[tuple[str, str]] = []
        self._app = DomainDispatcherApplication(create_backend_app)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else one line per request
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        query, method = environ["QUERY_STRING"], environ["REQUEST_METHOD"]
        operation = method.lower()
        if "list-type" in query:
            operation = "list"
        elif method == "POST" and "delete" in query:
            operation = "delete many"
        elif "HTTP_X_AMZ_COPY_SOURCE" in environ:
            operation = "copy"
        _, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        self.requests.append((operation, key))
        return (self.fault(operation, key) or self._app)(environ, start_response)


def error(status: int, code: str, message: str = "on purpose") -> Response:
    """Error response of S3."""
    return Response(f"<Error><Code>{code}</Code><Message>{message}</Message></Error>", status, mimetype="text/xml")


@contextmanager
def serve(server: S3Server | None = None) -> Iterator[Path]:
    """Context manager that yields the bucket `s3://bucket`; child processes find the server by the environment."""
    found = os.environ.get(ENDPOINT) if server is None else None
    started = S3Server() if server is None and not found else server
    endpoint = found or (started and started.endpoint)
    given = {name: os.environ.get(name, value) for name, value in CREDENTIALS.items()} if found else CREDENTIALS
    try:
        with patch.dict(os.environ, given | {"AWS_ENDPOINT_URL": str(endpoint)}):
            bucket = storage_path("s3://bucket")
            bucket.fs.clear_instance_cache()  # a cached client may have another endpoint
            bucket = storage_path("s3://bucket")
            if not found and not bucket.fs.exists("bucket"):  # all servers of this process share their buckets
                bucket.fs.mkdir("bucket")
            yield bucket
            bucket.fs.clear_instance_cache()  # later tests must not get a client of this server
    finally:
        if started:
            started.stop()

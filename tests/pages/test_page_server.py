"""Pages served to a browser that may go away at any time."""

import logging
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest

from cdpo_ray.pages.server import LOOPBACK, Answer, PageServer

LARGE = bytes(20_000_000)


def answer(path: str) -> Answer:
    if path == "/broken":
        raise KeyError("no such\nthing")
    return Answer(LARGE if path == "/large" else b"small", "text/plain", "default-src 'none'")


@pytest.fixture
def server() -> Iterator[PageServer]:
    with PageServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(server: PageServer, path: str) -> socket.socket:
    connection = socket.create_connection((LOOPBACK, server.server_port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {LOOPBACK}\r\n\r\n".encode())
    return connection


def test_a_browser_that_closes_its_connection_leaves_nothing_on_the_terminal(
    server: PageServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    connection = request(server, "/large")
    connection.recv(1000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()  # with a reset
    assert urllib.request.urlopen(server.url).read() == b"small"
    time.sleep(0.5)
    assert capfd.readouterr() == ("", "") and not caplog.records


def test_an_error_in_an_answer_is_one_line_and_the_server_goes_on(
    server: PageServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), request(server, "/broken") as connection:
        assert connection.recv(1000) == b""
    assert [record.getMessage() for record in caplog.records] == ["a request failed: KeyError: 'no such\\nthing'"]
    assert urllib.request.urlopen(server.url).read() == b"small"
    assert "Traceback" not in capfd.readouterr().err

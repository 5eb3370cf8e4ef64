"""`cdpo export --push`, against a server on this machine that answers as the hub does."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TOKEN = "hf_" + "s3cret" * 5
CODE = """
import sys
from pathlib import Path
from cdpo_ray.errors import ExportError
from cdpo_ray.export.push import push
try:
    print(push(Path(sys.argv[1]), "somebody/aligned", dataset=sys.argv[2] == "dataset"))
except ExportError as error:
    sys.exit(f"ExportError: {error}")
"""


class Hub(ThreadingHTTPServer):
    """Stores the files of a commit; answers every request with ``status``, if given."""

    def __init__(self, status: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status = status
        self.requests: list[tuple[str, str | None]] = []
        self.created: dict[str, object] = {}
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, self.headers.get("Authorization")))
        found: object = {}
        if self.path == "/api/repos/create":
            self.server.created = json.loads(content)
            found = {"url": f"{self.server.address}/somebody/aligned"}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(content)["files"]]
            found = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif "/commit/" in self.path:
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {"commitUrl": f"{self.server.address}/somebody/aligned/commit/1", "commitOid": "1" * 40}
        body = json.dumps(found).encode()
        self.send_response(self.server.status or 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "export"
    (path / "images").mkdir(parents=True)
    for name in ("README.md", "lora.safetensors", "images/0.png"):
        (path / name).write_bytes(name.encode() * 3)
    return path


def pushed(folder: Path, kind: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_TOKEN": TOKEN, **environment}
    found = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), kind], env=environment, capture_output=True, text=True, timeout=120
    )
    assert TOKEN not in found.stdout + found.stderr, "the token is never printed"
    return found


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_every_file_is_uploaded_with_the_token_to_a_private_repository(hub: Hub, folder: Path, kind: str) -> None:
    found = pushed(folder, kind, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == f"{hub.address}/somebody/aligned/commit/1"
    assert (hub.created["organization"], hub.created["name"], hub.created["visibility"]) == (
        "somebody",
        "aligned",
        "private",
    )
    assert hub.created.get("type", "model") == kind
    assert hub.files == {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    writing = {path: token for path, token in hub.requests if "/preupload/" in path or "/commit/" in path}
    assert all(path.startswith(f"/api/{kind}s/somebody/aligned/") for path in writing) and len(writing) == 2
    assert {*writing.values()} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (403, r"the hub refuses \(403\); give a token that may write there"),
        (413, r"the hub answers with status 413; try again later"),
    ],
)
def test_fault_39_a_refused_upload_is_one_line_with_the_command_that_uploads(
    hub: Hub, folder: Path, status: int, why: str
) -> None:
    hub.status = status
    found = pushed(folder, "dataset", HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="0")
    assert found.returncode == 1 and not hub.files
    command = rf"`hf upload --repo-type dataset somebody/aligned {re.escape(str(folder))} \.` uploads it"
    assert re.fullmatch(
        rf"ExportError: `--push` somebody/aligned: {why}.*; the export is complete, {command}\n", found.stderr
    )


def test_fault_39_an_upload_without_a_network_is_one_line(folder: Path) -> None:
    found = pushed(folder, "model", HF_HUB_OFFLINE="1")
    assert found.returncode == 1
    assert found.stderr.startswith(
        "ExportError: `--push` somebody/aligned: HF_HUB_OFFLINE is set; the export is complete"
    )
    assert found.stderr.count("\n") == 1

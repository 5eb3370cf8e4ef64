"""A head with token access on loopback: who is let in, who is not, and how that is told."""

import contextlib
import http.server
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from cdpo_ray.errors import ClusterError
from cdpo_ray.session import is_exposed, ray_session

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str
    access: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**changes: str) -> dict[str, str]:
    """Ours without what names a cluster or opens it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | changes


def called(*command: str, cwd: Path = ROOT, **changes: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        env=environment(**changes),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` as `cluster/` starts it; ended with all of its processes, and only those."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard = free_port(), free_port()
    command = f"ray start --head --block --port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={dashboard}"
    options = f"--num-cpus=4 --ray-client-server-port={free_port()} --disable-usage-stats"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [str(BIN / "ray"), *f"{command} {options}".split()[1:]],
            env=environment(**access),
            stdout=log,
            stderr=log,
        )
    try:
        jobs = urllib.request.Request(
            f"http://127.0.0.1:{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token.read_text()}"}
        )
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(jobs, timeout=5).close()
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", access)
    finally:
        process.terminate()  # `ray start --block` ends what it started
        process.wait(60)


@pytest.mark.ray
def test_a_job_ends_with_the_code_of_its_command_and_tells_why(head: Head, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("run: {name: bad}\n")
    submit = ("ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", "cdpo", "check")
    failed = called(*submit, "bad.yaml", cwd=tmp_path, **head.access)
    assert failed.returncode == 1
    assert "ConfigError: bad.yaml: " in failed.stdout + failed.stderr


@pytest.mark.ray
@pytest.mark.nightly
def test_a_job_walks_the_whole_way_in_the_cluster_that_it_is_in(head: Head, tmp_path: Path) -> None:
    submit = ("ray", "job", "submit", "--address", head.dashboard, "--working-dir", "configs", "--")
    done = called(*submit, "cdpo", "run", "smoke.yaml", f"run.dir={tmp_path}", **head.access)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "smoke" / "report.html").is_file()
    assert "evaluate: " in done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.parametrize("access", [{}, {"Authorization": "Bearer " + "0" * 64}], ids=["none", "another"])
def test_the_job_api_lets_nobody_in_without_the_token(head: Head, access: dict[str, str]) -> None:
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=access)
    with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
        urllib.request.urlopen(request, timeout=30)


@pytest.mark.ray
def test_a_wrong_token_is_told_in_seconds_and_never_printed(head: Head, tmp_path: Path) -> None:
    wrong = secrets.token_hex(32)
    started = time.monotonic()
    refused = called(
        "cdpo", "generate", "configs/smoke.yaml", f"run.dir={tmp_path}", "--address", head.address,
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=wrong,
    )  # fmt: skip
    assert refused.returncode == 2
    assert f"\nClusterError: Ray at {head.address}: does not let us in" in f"\n{refused.stderr}"
    assert "Traceback" not in refused.stderr and wrong not in refused.stdout + refused.stderr
    assert time.monotonic() - started < 60  # without our limits 81 s on an idle machine


def test_an_address_where_nobody_answers_is_told_before_ray_is_asked() -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(ClusterError, match=rf"^Ray at {address}: does not answer .*refused"),
        ray_session(address=address),
    ):
        pass


@pytest.mark.parametrize("address", ["head", "10.0.0.1:", "10.0.0.1:ray"])
def test_an_address_that_is_none_is_told(address: str) -> None:
    with pytest.raises(ClusterError, match="must be host:port"), ray_session(address=address):
        pass


@contextlib.contextmanager
def dashboard(mode: str) -> Iterator[str]:
    """Answers as Ray's dashboard does, on an address that is not the loopback's."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"authentication_mode": mode}).encode())

        def log_message(self, *_: object) -> None:
            pass

    host = get_node_ip_address()
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{host}:{server.server_port}"
        server.shutdown()


def test_fault_26_a_dashboard_for_everyone_is_known_by_its_address_and_its_mode() -> None:
    with dashboard("disabled") as open_to_all:
        if open_to_all.startswith("127."):
            pytest.skip("this machine has no address but the loopback's")
        assert is_exposed(open_to_all)
        assert not is_exposed(f"127.0.0.1:{open_to_all.rpartition(':')[2]}")
    with dashboard("token") as guarded:
        assert not is_exposed(guarded)
    assert not is_exposed(None) and not is_exposed("[::1]:8265")


@pytest.mark.ray
def test_fault_26_a_cluster_with_a_dashboard_for_everyone_is_refused(tmp_path: Path) -> None:
    program = (
        "import ray\n"
        "from cdpo_ray.session import ray_session\n"
        f"ray.init(address='local', num_cpus=1, dashboard_host='0.0.0.0', dashboard_port={free_port()})\n"
        "import os\n"
        "os.environ['RAY_ADDRESS'] = ray.get_runtime_context().gcs_address\n"
        "with ray_session():\n"
        "    print('LET IN')\n"
    )
    (tmp_path / "program.py").write_text(program)
    refused = called("python", str(tmp_path / "program.py"), RAY_AUTH_MODE="disabled")
    assert "LET IN" not in refused.stdout
    assert "ClusterError: Ray's dashboard " in refused.stderr, refused.stderr

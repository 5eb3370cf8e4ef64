"""Connecting to Ray: a head with token access on loopback, wrong addresses and tokens, and a local Ray."""

import contextlib
import http.server
import json
import logging
import re
import resource
import secrets
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.log import PlainRayHandler
from ray.util import get_node_ip_address
from ray_nodes import BIN, ROOT, Head, environment, free_port, started_head

from cdpo_ray.errors import ClusterError
from cdpo_ray.session import (
    LONGEST_IN_PARENT,
    LONGEST_SOCKET,
    _private_folder,
    _refusal,
    _silence_ray_on_the_terminal,
    is_exposed,
    ray_session,
    refuse_small_limits,
)


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
    with started_head(tmp_path_factory.mktemp("head"), num_cpus=4) as head:
        yield head


@pytest.mark.ray
def test_a_job_ends_with_the_exit_code_of_its_command_and_shows_the_error(head: Head, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("run: {name: bad}\n")
    submit = ("ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", "cdpo", "check")
    failed = called(*submit, "bad.yaml", cwd=tmp_path, **head.access)
    assert failed.returncode == 1
    assert "ConfigError: bad.yaml: " in failed.stdout + failed.stderr


@pytest.mark.ray
@pytest.mark.nightly
def test_a_job_runs_the_whole_pipeline_in_its_cluster(head: Head, tmp_path: Path) -> None:
    submit = ("ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--")
    done = called(*submit, "cdpo", "run", "configs/smoke.yaml", f"run.dir={tmp_path}", **head.access)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "smoke" / "report.html").is_file()
    assert "evaluate: " in done.stdout + done.stderr


@pytest.mark.ray
@pytest.mark.parametrize("access", [{}, {"Authorization": "Bearer " + "0" * 64}], ids=["none", "another"])
def test_the_job_api_refuses_requests_without_the_token(head: Head, access: dict[str, str]) -> None:
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers=access)
    with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
        urllib.request.urlopen(request, timeout=30)


@pytest.mark.ray
def test_a_wrong_token_is_reported_in_seconds_and_never_printed(head: Head, tmp_path: Path) -> None:
    wrong = secrets.token_hex(32)
    started = time.monotonic()
    refused = called(
        "cdpo", "generate", "configs/smoke.yaml", f"run.dir={tmp_path}", "--address", head.address,
        RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=wrong,
    )  # fmt: skip
    assert refused.returncode == 2
    assert f"\nClusterError: Ray at {head.address}: refuses our token" in f"\n{refused.stderr}"
    assert "Traceback" not in refused.stderr and wrong not in refused.stdout + refused.stderr
    assert time.monotonic() - started < 60  # without our timeouts, 81 s on an idle machine


def test_an_address_that_does_not_answer_is_reported_before_ray_connects() -> None:
    address = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(ClusterError, match=rf"^Ray at {address}: does not answer .*refused"),
        ray_session(address=address),
    ):
        pass


@pytest.mark.parametrize(
    "address",
    ["head", "10.0.0.1:", "10.0.0.1:ray", ":6379", "10.0.0.1:0", "10.0.0.1:99999", "10.0.0.1:-1", "ftp://a:1", "auto:"],
)
def test_fault_34_a_malformed_address_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="must be host:port"), ray_session(address=address):
        pass


@pytest.mark.parametrize(
    ("address", "what_to_do"),
    [
        ("http://10.0.0.1:8265", r"submit a job to it instead: `ray job submit --address http://10\.0\.0\.1:8265 "),
        ("https://me:5ec2e7@host", r"got 'https://\*\*\*@host'; submit a job to it instead"),
        ("ray://10.0.0.1:10001", "Ray Client is not supported"),
        ("\x1b[31mhead", r"got '\\x1b\[31mhead'"),
    ],
)
def test_fault_34_an_address_of_another_kind_is_refused_with_a_remedy(
    address: str, what_to_do: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError, match=what_to_do), ray_session():
        pass


def test_ray_is_silenced_on_the_terminal_and_other_handlers_are_unchanged(tmp_path: Path) -> None:
    of_ray, of_others = PlainRayHandler(), [logging.StreamHandler(), logging.FileHandler(tmp_path / "log")]
    logger = logging.getLogger("ray.data")
    before = logger.handlers
    logger.handlers = [of_ray, *of_others]
    try:
        _silence_ray_on_the_terminal()
    finally:
        logger.handlers = before
    assert of_ray.level == logging.CRITICAL
    assert [handler.level for handler in of_others] == [logging.NOTSET, logging.NOTSET]


@pytest.mark.parametrize("host", ["no such host", "a..b", "x" * 5000, "[::1]"])
def test_fault_34_an_invalid_host_is_reported_in_a_short_line(host: str) -> None:
    with pytest.raises(ClusterError, match="does not answer") as caught, ray_session(address=f"{host}:1"):
        pass
    assert len(str(caught.value)) < 500


def test_fault_34_a_port_of_another_server_is_reported_before_ray_connects() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with (
            pytest.raises(ClusterError, match="the server at this port is not a Ray head"),
            ray_session(address=address),
        ):
            pass
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        (
            "a:1",
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.59.0"),
            "version .*2.59.0.*; ins",
        ),
        (
            "auto",
            ConnectionError("Could not find any running Ray instance."),
            "none is running on this machine; give a head",
        ),
        ("a:1", ConnectionError("Failed to connect"), "refuses our token .*; set RAY_AUTH_MODE=token"),
        ("a:1", ValueError("strange"), r"cannot be joined \(ValueError: strange\)"),
    ],
)
def test_fault_34_a_failed_connection_is_reported_by_its_cause(address: str, error: Exception, message: str) -> None:
    assert re.match(rf"Ray at {address}: .*{message}", str(_refusal(address, error)))


def test_fault_32_a_local_rays_folder_is_private_and_short_wherever_tmpdir_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    long = tmp_path / ("x" * 72)
    long.mkdir()
    for tempdir in (str(long), "/tmp"):
        monkeypatch.setattr(tempfile, "tempdir", tempdir)
        folder = _private_folder()
        try:
            assert folder.stat().st_mode & 0o777 == 0o700
            assert len(str(folder.parent)) + LONGEST_IN_PARENT <= LONGEST_SOCKET
        finally:
            folder.rmdir()


def test_fault_34_a_ray_tmpdir_that_is_too_long_or_missing_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, reason in ((str(tmp_path / ("x" * 72)), "too long for Ray's sockets"), ("/nowhere", "No such file")):
        monkeypatch.setenv("RAY_TMPDIR", given)
        with pytest.raises(ClusterError, match=rf"has no temporary folder .*{reason}.*; set RAY_TMPDIR"):
            _private_folder()


@pytest.mark.parametrize(
    ("kind", "what"),
    [(resource.RLIMIT_NOFILE, "open files"), (resource.RLIMIT_AS, "address space"), (resource.RLIMIT_NPROC, "threads")],
)
def test_fault_49_a_low_limit_is_reported_before_ray_starts(
    kind: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(resource, "getrlimit", lambda asked: (64, 64) if asked == kind else unlimited)
    with (
        pytest.raises(ClusterError, match=rf"needs at least [\d,]+ .*{what}, the limit is 64; run `ulimit -"),
        ray_session(),
    ):
        pass
    monkeypatch.setattr(resource, "getrlimit", lambda asked: unlimited)
    refuse_small_limits()


PROGRAM = """
import json, os, signal
import psutil
from cdpo_ray.session import ray_session

ours = lambda *_: None
signal.signal(signal.SIGTERM, ours)
with ray_session():
    import ray

    @ray.remote
    def look():
        import sys, statistics
        from cdpo_ray.rewards.scorer import load_reward
        found = {"path": list(sys.path), "cwd": os.getcwd(), "statistics": statistics.__file__}
        return found | {"score": load_reward("own:score", {})([], ["a"]), "own_path": sys.path[-1]}

    found = ray.get(look.remote())
    session = ray.get_runtime_context().get_session_name()
    processes = psutil.Process().children(recursive=True)
    found["groups"] = [os.getpgid(process.pid) for process in processes]
    arguments = [argument for process in processes for argument in process.cmdline()]
    found["root"] = next(each for each in arguments if each.startswith("--temp-dir=")).partition("=")[2]
    found["mode"] = oct(os.stat(os.path.dirname(found["root"])).st_mode & 0o777)
    found["cpus"] = ray.cluster_resources()["CPU"]
print(json.dumps(found | {"group": os.getpgrp(), "kept": os.path.exists(found["root"]),
    "handler": signal.getsignal(signal.SIGTERM) is ours}))
"""


@pytest.mark.ray
@pytest.mark.nightly
def test_fault_32_and_50_a_local_ray_is_private_apart_from_us_and_imports_nothing_from_the_working_folder(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("random", "json", "types", "statistics", "calendar"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported from the working folder')\n")
    (folder / "own.py").write_text("def score(images, prompts):\n    return [1.0] * len(prompts)\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = called("python", "-P", str(tmp_path / "program.py"), cwd=folder, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["mode"], found["kept"], found["handler"]) == ("0o700", False, True)
    assert found["group"] not in found["groups"]
    assert str(folder) not in found["path"] and found["cwd"] == found["own_path"] == str(folder)
    assert found["score"] == [1.0] and not found["statistics"].startswith(str(folder))


@pytest.mark.ray
@pytest.mark.nightly
def test_fault_46_a_job_does_not_write_into_rays_copy_of_the_working_folder(head: Head, tmp_path: Path) -> None:
    (tmp_path / "smoke.yaml").write_bytes((ROOT / "configs" / "smoke.yaml").read_bytes())
    submit = ("ray", "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--", "cdpo", "run")
    refused = called(*submit, "smoke.yaml", cwd=tmp_path, **head.access)
    assert refused.returncode == 1
    assert "StoreError: `run.dir` runs: is /" in refused.stdout + refused.stderr


@contextlib.contextmanager
def dashboard(mode: str) -> Iterator[str]:
    """Server that answers like Ray's dashboard, on an address other than loopback."""

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


def test_fault_26_an_open_dashboard_is_detected_by_its_address_and_its_mode() -> None:
    with dashboard("disabled") as open_to_all:
        if open_to_all.startswith("127."):
            pytest.skip("this machine has only the loopback address")
        assert is_exposed(open_to_all)
        assert not is_exposed(f"127.0.0.1:{open_to_all.rpartition(':')[2]}")
    with dashboard("token") as guarded:
        assert not is_exposed(guarded)
    assert not is_exposed(None) and not is_exposed("[::1]:8265")


@pytest.mark.ray
def test_fault_26_a_cluster_with_an_open_dashboard_is_refused(tmp_path: Path) -> None:
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

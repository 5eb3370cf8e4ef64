"""Ray nodes as `cluster/` starts them, on loopback; they are stopped with all of their processes, and only those."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
    """Our environment without Ray's variables, plus ``changes``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"PATH": f"{BIN}:{os.environ['PATH']}"} | changes


@contextlib.contextmanager
def started(options: str, log_path: Path, **changes: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Context manager around `ray start --block` with these options."""
    command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *options.split()]
    environ = environment(RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0", **changes)  # the default drains work for 30 s
    with log_path.open("w") as log, subprocess.Popen(command, env=environ, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()  # it also stops its child processes


@contextlib.contextmanager
def forgotten(port: int) -> Iterator[None]:
    """Delete Ray's record of this head: later Rays on this machine would try to connect to it."""
    note = Path("/tmp/ray/ray_current_cluster")
    try:
        yield
    finally:
        if note.is_file() and note.read_text().strip().endswith(f":{port}"):
            note.unlink()


@contextlib.contextmanager
def started_head(folder: Path, *, num_cpus: int, **changes: str) -> Iterator[Head]:
    """Context manager around a head with token access that accepts jobs.

    Args:
        folder: folder for its token and its log.
    """
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, dashboard = free_port(), free_port()
    options = f"--head --port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={dashboard}"
    # The agent accepts jobs; another Ray on this machine may use its default port.
    options += f" --num-cpus={num_cpus} --ray-client-server-port={free_port()}"
    options += f" --dashboard-agent-listen-port={free_port()}"
    with forgotten(gcs), started(options, folder / "head.log", **access, **changes) as process:
        jobs = urllib.request.Request(
            f"http://127.0.0.1:{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token.read_text()}"}
        )
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(jobs, timeout=5).close()
                break
            assert process.poll() is None, (folder / "head.log").read_text()
            time.sleep(0.5)
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", access)

"""Connection to Ray: the cluster of this job, a cluster that is named, or a local Ray with token access."""

import contextlib
import functools
import ipaddress
import json
import logging
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import urllib.request
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cdpo_ray import errors
from cdpo_ray.config.section import without_credentials
from cdpo_ray.errors import CdpoError, ClusterError
from cdpo_ray.resources import Node, usable_cpus

CONNECT_SECONDS = 5
MIN_LOCAL_CPUS = 4  # logical CPUs; with fewer, pipelines of several actor pools starve

MIN_OPEN_FILES = 512  # Ray warns below 4096; with very few, its processes hang
MIN_THREADS = 512  # a local Ray starts a few hundred
MIN_DATA_BYTES = 4 * 2**30
MIN_ADDRESS_SPACE_BYTES = 32 * 2**30  # a worker maps PyTorch and Ray's shared memory, most of it never used
DELETE_ATTEMPTS = 25
LONGEST_SOCKET = 107  # maximum length of a Unix socket's path
LONGEST_IN_PARENT = len("/cdpo-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_MetricsHead")
"""Longest path of a Ray socket, relative to the parent of the private folder."""

GPU_KIND = "accelerator_type:"
"""Prefix of the Ray resource that names a node's GPU model."""

log = logging.getLogger(__name__)
_ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` uploads the working folder and starts workers through uv
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also the interval at which reports are collected
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an extra process per training that our workers do not use
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else workers' lines are printed twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # hides GPUs from actors that request none
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives the session must not start another Ray
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in a config are relative to the working folder of the command
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output ignores the verbosity
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # we record the reports of trials ourselves
    "TOKENIZERS_PARALLELISM": "false",
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_QUIET = ("ray.data", "ray.train", "ray.tune", "ray._private.worker", "ray.serve")


def cluster_address(address: str | None = None) -> str | None:
    """Address of the cluster that `ray_session` connects to; ``None``: it starts a local Ray.

    Args:
        address: see `ray_session`.
    """
    address = address or os.environ.get("RAY_ADDRESS") or ("auto" if "RAY_JOB_ID" in os.environ else None)
    return None if address == "local" else address


@contextlib.contextmanager
def ray_session(*, address: str | None = None, verbose: bool = False) -> Iterator[None]:
    """Context manager that connects to Ray; a local Ray is started if there is no cluster, and stopped at the end.

    Inside a Ray job, or if ``RAY_ADDRESS`` is set, that cluster is used. A local Ray keeps its session in a folder that
    only this user can open. The folder is deleted at the end, unless Ray failed or ``RAY_TMPDIR``, which selects the
    parent folder, is set.

    Args:
        address: ``host:port`` of a cluster's head; overrides ``RAY_ADDRESS``.
        verbose: show the output of workers and Ray's log.

    Raises:
        ClusterError: the address is invalid or does not answer, the cluster refuses our token or is open to everyone,
            or a local Ray cannot start.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = cluster_address(address)
    in_cluster = address is not None
    if in_cluster:
        _refuse_silence(str(address))
        os.environ.setdefault(
            "RAY_gcs_server_port_wait_time_s", "3"
        )  # by default, a wrong token is reported after 20 s
    else:
        refuse_small_limits()
        os.environ.setdefault(
            "RAY_gcs_server_port_wait_time_s", "60"
        )  # the default of 30 s is too short on a busy machine
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for this process and its children only
        # With a lower value Ray warns about the number of workers that trials start.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
        if not verbose:  # Ray's core logs harmless warnings as errors
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray  # reads the environment variables above on import
    import ray.data
    import ray.train
    from ray.util.annotations import RayDeprecationWarning

    warnings.filterwarnings("ignore", category=RayDeprecationWarning)  # raised from Ray 2.64 on; our version is pinned

    logging_level = logging.INFO if verbose else logging.ERROR
    options = {"logging_level": logging_level, "log_to_driver": verbose}
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(_connected(str(address), options) if in_cluster else _local_ray(options))
        if not verbose:
            _silence_ray_on_the_terminal()
        # Tune has no other switch.
        logging.getLogger("ray.tune").setLevel(logging.NOTSET if verbose else logging.CRITICAL)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # `Progress` draws its own
        context.enable_operator_progress_bars = False
        context.execution_options.preserve_order = True
        context.execution_options.verbose_progress = False
        try:
            _refuse_open_dashboard(logging_level)
            yield
        except ray.exceptions.RayError as error:
            raise _for_people(error) from error


def _silence_ray_on_the_terminal() -> None:
    """Silence Ray's terminal handlers, which only print what Ray also raises; other handlers are unchanged."""
    for name in _QUIET:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler) and type(handler).__module__.startswith("ray."):
                handler.setLevel(logging.CRITICAL)


def refuse_small_limits() -> None:
    """Refuse resource limits of this process with which a local Ray would hang.

    Raises:
        ClusterError: the limit of open files, threads, address space or data is too low.
    """
    for kind, what, needed, command in (
        (resource.RLIMIT_NOFILE, "open files", MIN_OPEN_FILES, "ulimit -n 65536"),
        (resource.RLIMIT_NPROC, "processes and threads", MIN_THREADS, "ulimit -u unlimited"),
        (resource.RLIMIT_AS, "bytes of address space", MIN_ADDRESS_SPACE_BYTES, "ulimit -v unlimited"),
        (resource.RLIMIT_DATA, "bytes of data", MIN_DATA_BYTES, "ulimit -d unlimited"),
    ):
        soft, hard = resource.getrlimit(kind)
        limit = hard if kind == resource.RLIMIT_NOFILE else soft  # Ray raises the limit of open files to the hard limit
        if limit != resource.RLIM_INFINITY and limit < needed:
            raise ClusterError(
                f"Ray on this machine: needs at least {needed:,} {what}, the limit is {limit:,}; run `{command}` in"
                " this shell, or raise the limit of the service or container"
            )


@contextlib.contextmanager
def _connected(address: str, options: dict[str, Any]) -> Iterator[None]:
    import ray

    try:
        with _own_sigterm():
            ray.init(address=address, **options)
    except Exception as error:
        raise _refusal(address, error) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _local_ray(options: dict[str, Any]) -> Iterator[None]:
    """Start a local Ray in a private folder."""
    import ray

    folder = _private_folder()
    keeps_logs = "RAY_TMPDIR" in os.environ
    job_config = ray.job_config.JobConfig(_client_job=True)  # else Ray puts the working folder first on `sys.path`
    num_cpus = max(MIN_LOCAL_CPUS, usable_cpus())
    try:
        try:
            with _own_sigterm(), _own_processes():
                # Ray creates its folder with mode 0777, hence the private parent folder.
                ray.init(
                    address="local", num_cpus=num_cpus, _temp_dir=f"{folder}/ray", job_config=job_config, **options
                )
        except (Exception, SystemExit) as error:
            keeps_logs = True
            raise ClusterError(
                f"Ray on this machine: does not start ({type(error).__name__}: {_shortened(error)}); free memory and"
                f" disk space, or wait until the machine is less busy, and try again; Ray's logs are in {folder}"
            ) from None
        try:
            yield
        except ray.exceptions.RayError:
            keeps_logs = True
            log.warning("Ray's logs are in %s", folder)
            raise
        finally:
            ray.shutdown()
    finally:
        for _ in range(0 if keeps_logs else DELETE_ATTEMPTS):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.2)  # some of Ray's processes write for a short time after the shutdown


def _private_folder() -> Path:
    """Create a folder that only this user can open, with a path short enough for Ray's sockets."""
    given = os.environ.get("RAY_TMPDIR")
    parents = [given] if given else [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    longest = LONGEST_SOCKET - LONGEST_IN_PARENT
    faults = []
    for parent in parents:
        path = os.path.abspath(parent)
        if len(os.fsencode(path)) > longest:
            faults.append(f"{path} has more than {longest} characters, too long for Ray's sockets")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix="cdpo-", dir=path))
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
    raise ClusterError(
        f"Ray on this machine: has no temporary folder ({'; '.join(faults)}); set RAY_TMPDIR to a short path of a"
        " writable folder"
    )


@contextlib.contextmanager
def _own_processes() -> Iterator[None]:
    """Start Ray's processes in process groups of their own, and without the working folder on `sys.path`.

    A signal to our process group (Ctrl-C in a terminal, `timeout`, a batch system) then reaches only this process,
    which shuts Ray down. If this process dies, the kernel kills Ray's processes.
    """
    from ray._private import services

    start, safe_path = services.ConsolePopen, os.environ.get("PYTHONSAFEPATH")
    services.ConsolePopen = functools.partial(start, process_group=0)
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        services.ConsolePopen = start
        os.environ.pop("PYTHONSAFEPATH")
        if safe_path is not None:
            os.environ["PYTHONSAFEPATH"] = safe_path


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep our handler of SIGTERM, which `ray.init` replaces by one that exits without a message."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as stopped:
        if stopped.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt(signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, handler)


def _refusal(address: str, error: Exception) -> ClusterError:
    """Error about a cluster that cannot be joined."""
    import ray

    what = f"{type(error).__name__}: {_shortened(error)}"
    if "ersion mismatch" in what:
        reason = f"has another version ({what}); install the same Ray and Python here and on the cluster"
    elif address == "auto" and isinstance(error, ConnectionError) and "find any running" in what:
        reason = "none is running on this machine; give a head as HOST:PORT, or unset RAY_ADDRESS to start a local Ray"
    elif isinstance(error, ConnectionError | ray.exceptions.AuthenticationError):
        reason = (
            f"refuses our token ({type(error).__name__}); set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file"
            " with the cluster's token, before ray is first imported"
        )
    else:
        reason = f"cannot be joined ({what}); check that this is the port of a head (6379 by default)"
    return ClusterError(f"Ray at {address}: {reason}")


def _shortened(error: BaseException) -> str:
    return " ".join(f"{error} {error.__cause__ or ''}".split())[:300]


def cluster_nodes() -> tuple[list[Node], bool]:
    """Nodes of the connected cluster, and whether an autoscaler may add some.

    The autoscalers of Ray 2.60 do not report which nodes, or how many.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    nodes = [
        _node(node["NodeManagerAddress"], node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]
    ]
    v1 = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
    v2 = get_cluster_status(ray.get_runtime_context().gcs_address)
    types = {*(v1.get("active_nodes") or ()), *(node.ray_node_type_name for node in v2.active_nodes + v2.idle_nodes)}
    # An autoscaler reports the node types of its config; without one, each node is its own type, named by its id.
    return nodes, any(not name.startswith("node_") for name in types)


def map_on_nodes(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Apply a function to items in Ray tasks, one at a time for each node of the cluster; yields the results in order.

    The tasks request no CPU: they neither wait for actors that hold all CPUs, nor for nodes from an autoscaler.
    """
    import ray

    num_nodes = sum(node["Alive"] for node in ray.nodes())
    task = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy="SPREAD")(function)
    running = deque[Any]()
    for item in items:
        if len(running) >= num_nodes:
            yield ray.get(running.popleft())
        running.append(task.remote(item))
    yield from map(ray.get, running)


def is_exposed(dashboard: str | None) -> bool:
    """Whether a dashboard (``host:port``) is reachable over the network and requires no token."""
    host = (dashboard or "").rpartition(":")[0].strip("[]")
    if not host or host == "localhost" or ipaddress.ip_address(host).is_loopback:
        return False
    try:
        with urllib.request.urlopen(f"http://{dashboard}/api/authentication_mode", timeout=CONNECT_SECONDS) as answer:
            return bool(json.load(answer)["authentication_mode"] == "disabled")
    except OSError:
        return False  # not reachable from here


def _refuse_open_dashboard(logging_level: int) -> None:
    import ray

    # Returns the existing session; without the level, Ray would reset the logger to INFO.
    with _own_sigterm():
        connected = ray.init(ignore_reinit_error=True, logging_level=logging_level)
    if is_exposed(dashboard := connected.dashboard_url):
        raise ClusterError(
            f"Ray's dashboard {dashboard}: requires no token and runs the code of anyone who reaches it; start the"
            " cluster with RAY_AUTH_MODE=token on every node, or with --dashboard-host 127.0.0.1"
        )


def _refuse_silence(address: str) -> None:
    """Refuse an address that does not answer: Ray would wait for 80 s and then end the process."""
    if address == "auto":
        return
    shown = repr(without_credentials(address)[:200])[1:-1]
    scheme, is_url, _ = address.partition("://")
    host, _, port = address.rpartition(":")
    if is_url or not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        instead = {
            "http": f"; submit a job to it instead: `ray job submit --address {shown} --working-dir . -- cdpo ...`",
            "ray": "; Ray Client is not supported",
        }.get(scheme.removesuffix("s") if is_url else "", "")
        raise ClusterError(
            f"Ray address: must be host:port of a cluster's head, such as 10.0.0.1:6379, got '{shown}'{instead};"
            " correct --address or RAY_ADDRESS, or omit both to start a local Ray"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:  # ValueError: an invalid host name
        raise ClusterError(
            f"Ray at {shown}: does not answer ({error}); check that its head is running and that the port is open to"
            " this machine"
        ) from None
    if os.environ.get("RAY_USE_TLS", "0") == "0" and not _speaks_grpc(host.strip("[]"), int(port)):
        raise ClusterError(
            f"Ray at {shown}: the server at this port is not a Ray head; give the port of `ray start --head` (6379 by"
            " default)"
        )


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether a server answers an HTTP/2 preface with a SETTINGS frame, as every gRPC server does."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=CONNECT_SECONDS) as server:
        server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        frame = server.recv(9, socket.MSG_WAITALL)
        return len(frame) == 9 and frame[3] == 4
    return False


def _node(name: str, resources: Any, labels: Mapping[str, str]) -> Node:
    kind = next((key.removeprefix(GPU_KIND) for key in resources if key.startswith(GPU_KIND)), None)
    return Node(name, resources.get("CPU", 0), (1.0,) * int(resources.get("GPU", 0)), kind, labels)


def _for_people(error: BaseException) -> BaseException:
    """Our own error that was raised in an actor, unwrapped from Ray's exception; else the exception itself."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None) or seen.__cause__
        for candidate in (seen, cause):
            if isinstance(candidate, CdpoError):
                ours = next(kind for kind in type(candidate).__mro__ if kind.__module__ == CdpoError.__module__)
                return ours(str(getattr(candidate, "cause", candidate)))
        seen = cause if cause is not seen else None
    # Of an error in an actor's constructor, only the text is available.
    if found := re.findall(r"^cdpo_ray\.errors\.(\w+): (.+)$", str(error), flags=re.MULTILINE):
        name, message = found[-1]
        return getattr(errors, name)(message)
    return error

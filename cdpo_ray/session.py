"""The Ray that a run works on: the cluster it is in, the one that is named, or a local one with token access."""

import contextlib
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import urllib.request
import warnings
from collections.abc import Iterator
from typing import Any

from cdpo_ray import errors
from cdpo_ray.errors import CdpoError, ClusterError
from cdpo_ray.resources import Node

CONNECT_SECONDS = 5
MIN_LOCAL_CPUS = 4  # with fewer logical CPUs, pipelines of several actor pools starve

GPU_KIND = "accelerator_type:"
"""Prefix of the resource by which Ray names a node's GPUs."""

_ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` uploads the working folder and starts workers through uv
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # reports are collected at this pace
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process a training, and no worker here asks it anything
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else workers' lines come twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor that asks for no GPU sees none
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that outlives the session must start no Ray of its own
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of a config are meant from where the command was given
    "RAY_AIR_NEW_OUTPUT": "0",  # its new one prints what it was asked not to
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # what a trial reports we keep ourselves
    "TOKENIZERS_PARALLELISM": "false",
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_QUIET = ("ray.data", "ray.train", "ray.tune", "ray._private.worker", "ray.serve")


@contextlib.contextmanager
def ray_session(*, address: str | None = None, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray for the block; a local Ray started here ends with it.

    Inside a Ray job, or with ``RAY_ADDRESS`` set, that cluster is used as it is.

    Args:
        address: ``host:port`` of a cluster's head, before ``RAY_ADDRESS``.
        verbose: show what workers print and what Ray logs.

    Raises:
        ClusterError: the address is none, nobody answers there, our token is not the cluster's, or anyone may use it.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS") or ("auto" if "RAY_JOB_ID" in os.environ else None)
    in_cluster = address not in (None, "local")
    if in_cluster:
        _refuse_silence(str(address))
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "3")  # else a wrong token is told after 20 s
    elif "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for this process and its children only
    if not in_cluster:
        os.environ.setdefault(
            "RAY_worker_maximum_startup_concurrency", "8"
        )  # with fewer it prints that trials have many
    if not in_cluster and not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its core logs warnings of its own making as errors
    import ray  # the environment above is read at import
    import ray.data
    import ray.train
    from ray.util.annotations import RayDeprecationWarning

    warnings.filterwarnings("ignore", category=RayDeprecationWarning)  # from 2.64 on; the version is pinned

    already = ray.is_initialized()
    logging_level = logging.INFO if verbose else logging.ERROR
    if not already:
        where: dict[str, Any] = {"address": address}
        if not in_cluster:
            where = {"address": "local", "num_cpus": max(MIN_LOCAL_CPUS, os.cpu_count() or 1)}
        try:
            ray.init(logging_level=logging_level, log_to_driver=verbose, **where)
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ClusterError(
                f"Ray at {address or 'this machine'}: does not let us in ({type(error).__name__}); set"
                " RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token, before ray is first"
                " imported"
            ) from None
    for name in () if verbose else _QUIET:
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL)  # what it would tell, it also raises
    logging.getLogger("ray.tune").setLevel(logging.NOTSET if verbose else logging.CRITICAL)  # nor has Tune another way
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # `Progress` has one of its own
    context.enable_operator_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    try:
        _refuse_open_dashboard(logging_level)
        yield
    except ray.exceptions.RayError as error:
        raise _for_people(error) from error
    finally:
        if not already:
            ray.shutdown()


def cluster_nodes() -> tuple[list[Node], bool]:
    """The nodes of the cluster that we are connected to, and whether an autoscaler may add some.

    Which, and how many, no autoscaler of Ray 2.60 tells.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    nodes = [_node(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    v1 = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
    v2 = get_cluster_status(ray.get_runtime_context().gcs_address)
    types = {*(v1.get("active_nodes") or ()), *(node.ray_node_type_name for node in v2.active_nodes + v2.idle_nodes)}
    # An autoscaler names the groups of its file; without one each node is a group of its own, named by its id.
    return nodes, any(not name.startswith("node_") for name in types)


def is_exposed(dashboard: str | None) -> bool:
    """Whether anyone who reaches a dashboard (``host:port``) over the network may use it: it asks for no token."""
    host = (dashboard or "").rpartition(":")[0].strip("[]")
    if not host or host == "localhost" or ipaddress.ip_address(host).is_loopback:
        return False
    try:
        with urllib.request.urlopen(f"http://{dashboard}/api/authentication_mode", timeout=CONNECT_SECONDS) as answer:
            return bool(json.load(answer)["authentication_mode"] == "disabled")
    except OSError:
        return False  # not from here


def _refuse_open_dashboard(logging_level: int) -> None:
    import ray

    # Returns the existing session; without its level given again, Ray would reset the logger to INFO.
    connected = ray.init(ignore_reinit_error=True, logging_level=logging_level)
    if is_exposed(dashboard := connected.dashboard_url):
        raise ClusterError(
            f"Ray's dashboard {dashboard}: runs the code of anyone who reaches it, it asks for no token; start the"
            " cluster with RAY_AUTH_MODE=token on every node, or with --dashboard-host 127.0.0.1"
        )


def _refuse_silence(address: str) -> None:
    """Ray itself waits for 80 s, and then ends the process."""
    if address == "auto" or "://" in address:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except ValueError:
        raise ClusterError(f"Ray address: must be host:port, as 10.0.0.1:6379, got {address!r}") from None
    except OSError as error:
        raise ClusterError(
            f"Ray at {address}: does not answer ({error}); is its head running, and is the port open to this machine?"
        ) from None


def _node(name: str, resources: Any) -> Node:
    kind = next((key.removeprefix(GPU_KIND) for key in resources if key.startswith(GPU_KIND)), None)
    return Node(name, resources.get("CPU", 0), (1.0,) * int(resources.get("GPU", 0)), kind)


def _for_people(error: BaseException) -> BaseException:
    """The error of ours that was raised in an actor, out of what Ray wrapped it in; else the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None) or seen.__cause__
        for candidate in (seen, cause):
            if isinstance(candidate, CdpoError):
                ours = next(kind for kind in type(candidate).__mro__ if kind.__module__ == CdpoError.__module__)
                return ours(str(getattr(candidate, "cause", candidate)))
        seen = cause if cause is not seen else None
    # Of an error in an actor's constructor only the text is left.
    if told := re.findall(r"^cdpo_ray\.errors\.(\w+): (.+)$", str(error), flags=re.MULTILINE):
        name, message = told[-1]
        return getattr(errors, name)(message)
    return error

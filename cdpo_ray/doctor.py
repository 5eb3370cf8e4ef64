"""Checks of the machine, the cluster and the configuration before a run, each with a remedy."""

import os
import shutil
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

from cdpo_ray.config import Config
from cdpo_ray.cost.estimate import estimate
from cdpo_ray.cost.gpus import DEFAULT_GPU, GIB, gpu_of_device
from cdpo_ray.cost.sentences import memory_faults
from cdpo_ray.errors import CdpoError, StoreError
from cdpo_ray.preflight import missing_weights, refuse_unwritable
from cdpo_ray.run import check_cluster, read_prompts
from cdpo_ray.session import cluster_nodes, ray_session
from cdpo_ray.steps import steps_of
from cdpo_ray.steps.cost import workload_of
from cdpo_ray.store import is_local, output_path

OK, WARN, WRONG = "ok", "warn", "wrong"
FLOORS = {"ray": "2.60", "diffusers": "0.42.1", "transformers": "5.3", "torch": "2.10"}
"""Lowest versions without published vulnerabilities."""
LOW_DISK_BYTES = 10 * 2**30
HUB_SECONDS = 4


class CheckResult(NamedTuple):
    """Result of one check.

    Attributes:
        grade: `OK`, `WARN` or `WRONG`.
        message: what was checked, what was found, and what to do.
    """

    grade: str
    message: str

    def __str__(self) -> str:
        return f"{self.grade:<5}  {self.message}"


def examine(config: Config | None, *, address: str | None = None) -> Iterator[CheckResult]:
    """Check everything that a run needs, quick checks first; only a temporary file in `run.dir` is written.

    Args:
        config: configuration to check; ``None``: only the machine and the cluster.
        address: address of a Ray cluster, see `session.ray_session`.
    """
    yield from _versions()
    yield _gpus()
    yield from _token()
    yield from _hub()
    if config:
        yield _storage(config)
        yield _weights(config)
        yield from _memory(config)
    yield from _ray(config, address)


def _versions() -> Iterator[CheckResult]:
    for name, floor in FLOORS.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield CheckResult(WRONG, f"{name}: not installed; install requirements.lock")
            continue
        if Version(version) < Version(floor):
            yield CheckResult(
                WRONG, f"{name} {version}: has a vulnerability fixed in {floor}; install requirements.lock"
            )
        else:
            yield CheckResult(OK, f"{name} {version}")


def _gpus() -> CheckResult:
    import torch

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        listed = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
        return CheckResult(OK, f"GPUs of this machine: {listed}, CUDA {torch.version.cuda}")
    if Path("/dev/nvidia0").exists():
        return CheckResult(WRONG, f"GPU: present, but torch {torch.__version__} does not detect it; update the driver")
    return CheckResult(
        WARN, "GPU: none on this machine; sufficient for the smoke and quickstart configs, or with a cluster"
    )


def _token() -> Iterator[CheckResult]:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.is_file():
        mode = stat.S_IMODE(path.stat().st_mode)
        is_exposed = bool(mode & 0o077)
        yield CheckResult(
            WRONG if is_exposed else OK,
            f"token file {path}: mode {mode:04o}"
            + (f", other users may read it; run `chmod 600 {path}`" if is_exposed else ""),
        )
    elif "RAY_AUTH_TOKEN_PATH" in os.environ:
        yield CheckResult(
            WRONG, f"token file {path}: is missing; write the cluster's token to it, or unset RAY_AUTH_TOKEN_PATH"
        )
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        yield CheckResult(WARN, "RAY_AUTH_MODE=disabled: anyone who reaches Ray's ports can run code; unset it")


def _hub() -> Iterator[CheckResult]:
    from huggingface_hub import constants, get_token

    yield CheckResult(OK, f"hub token: {'found' if get_token() else 'none; gated models need one (`hf auth login`)'}")
    if constants.HF_HUB_OFFLINE:
        yield CheckResult(OK, f"hub: HF_HUB_OFFLINE is set; models are loaded from {constants.HF_HUB_CACHE}")
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError as error:
        yield CheckResult(WARN, f"hub: answers with status {error.code}; models that are not cached may fail to load")
    except OSError as error:
        yield CheckResult(
            WARN, f"hub: cannot be reached ({type(error).__name__}); only local and cached models will load"
        )
    else:
        yield CheckResult(OK, "hub: can be reached")


def _storage(config: Config) -> CheckResult:
    try:
        run_dir = output_path(config.run.dir, "run.dir")
        existing = refuse_unwritable(run_dir, "run.dir")
    except StoreError as error:
        return CheckResult(WRONG, str(error))
    if not is_local(run_dir):
        return CheckResult(OK, f"`run.dir` {config.run.dir}: can be written")
    free = shutil.disk_usage(existing).free
    message = f"`run.dir` {config.run.dir}: can be written, {free / 2**30:.1f} GiB free"
    return CheckResult(OK if free >= LOW_DISK_BYTES else WARN, message)


def _weights(config: Config) -> CheckResult:
    missing = missing_weights(config)
    if not missing:
        return CheckResult(OK, "weights: the model's and the judges' are on this machine")
    return CheckResult(WARN, f"weights: not on this machine, downloaded when they are first used: {', '.join(missing)}")


def _memory(config: Config) -> Iterator[CheckResult]:
    """Compare the estimated peak memory of each role with the memory of this machine's GPU."""
    import torch

    if not torch.cuda.is_available():
        return
    device = torch.cuda.get_device_properties(0)
    memory_gib = device.total_memory / GIB
    gpu = replace(gpu_of_device(device.name, memory_gib) or DEFAULT_GPU, name=device.name, memory_gib=memory_gib)
    try:
        load, known = workload_of(config, read_prompts(config), gpu)
    except CdpoError as error:
        yield CheckResult(WARN, f"memory: {error}")
        return
    faults = memory_faults(estimate(load))
    yield from (CheckResult(WARN, fault) for fault in faults)
    if not faults:
        yield CheckResult(OK, f"memory: by estimate, every role fits on {device.name} ({known.source})")


def _ray(config: Config | None, address: str | None) -> Iterator[CheckResult]:
    try:
        with ray_session(address=address):
            nodes, grows = cluster_nodes()
            cpus, gpus = sum(node.cpus for node in nodes), sum(len(node.gpus) for node in nodes)
            more = ", and an autoscaler that may add nodes" if grows else ""
            yield CheckResult(OK, f"Ray: nodes {len(nodes)}, CPUs {cpus:g}, GPUs {gpus}{more}")
            if config:
                warnings = check_cluster(config, steps_of(config))
                yield from (CheckResult(WARN, line) for line in warnings)
                if not warnings:
                    yield CheckResult(OK, "`resources`: every step fits")
    except CdpoError as error:
        yield CheckResult(WRONG, str(error))

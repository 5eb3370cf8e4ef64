"""What of a machine, a cluster and a configuration will not do, and what to do."""

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
from cdpo_ray.run import check_cluster, read_prompts
from cdpo_ray.session import cluster_nodes, ray_session
from cdpo_ray.steps import steps_of
from cdpo_ray.steps.cost import workload_of
from cdpo_ray.store import delete, is_local, output_path, write_text

OK, WARN, WRONG = "ok", "warn", "wrong"
FLOORS = {"ray": "2.60", "diffusers": "0.42.1", "transformers": "5.3", "torch": "2.10"}
"""Each closes a published hole."""
LITTLE_BYTES = 10 * 2**30
HUB_SECONDS = 4


class CheckResult(NamedTuple):
    grade: str
    what: str

    def __str__(self) -> str:
        return f"{self.grade:<5}  {self.what}"


def examine(config: Config | None, *, address: str | None = None) -> Iterator[CheckResult]:
    """Look at everything that a run needs, the quick things first; changes nothing but a file that it deletes again."""
    yield from _versions()
    yield _gpus()
    yield from _token()
    yield from _hub()
    if config:
        yield _storage(config)
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
            yield CheckResult(WRONG, f"{name} {version}: {floor} closes a hole that it has; install requirements.lock")
        else:
            yield CheckResult(OK, f"{name} {version}")


def _gpus() -> CheckResult:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        told = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in names)
        return CheckResult(OK, f"GPUs of this machine: {told}, CUDA {torch.version.cuda}")
    if Path("/dev/nvidia0").exists():
        return CheckResult(
            WRONG, f"GPU: there, but torch {torch.__version__} does not see it; is the driver new enough?"
        )
    return CheckResult(
        WARN, "GPU: none on this machine; fine for the smoke and quickstart configs, or beside a cluster"
    )


def _token() -> Iterator[CheckResult]:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if path.is_file():
        mode = stat.S_IMODE(path.stat().st_mode)
        others = mode & 0o077
        yield CheckResult(
            WRONG if others else OK,
            f"token file {path}: mode {mode:04o}" + (f", others may read it; `chmod 600 {path}`" if others else ""),
        )
    elif "RAY_AUTH_TOKEN_PATH" in os.environ:
        yield CheckResult(
            WRONG, f"token file {path}: not there; write the cluster's token to it, or unset RAY_AUTH_TOKEN_PATH"
        )
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        yield CheckResult(WARN, "RAY_AUTH_MODE=disabled: whoever reaches Ray's ports runs code; unset it")


def _hub() -> Iterator[CheckResult]:
    from huggingface_hub import constants, get_token

    yield CheckResult(OK, f"hub token: {'there' if get_token() else 'none; gated models need one (`hf auth login`)'}")
    if constants.HF_HUB_OFFLINE:
        yield CheckResult(OK, f"hub: HF_HUB_OFFLINE is set; models come from {constants.HF_HUB_CACHE}")
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError as error:
        yield CheckResult(WARN, f"hub: answers with {error.code}; models that are not cached may not be fetched")
    except OSError as error:
        yield CheckResult(
            WARN, f"hub: cannot be reached ({type(error).__name__}); only local and cached models will load"
        )
    else:
        yield CheckResult(OK, "hub: can be reached")


def _storage(config: Config) -> CheckResult:
    try:
        run_dir = output_path(config.run.dir, "run.dir")
        there = next((folder for folder in (run_dir, *run_dir.parents) if folder.exists()), run_dir)
        probe = there / f".doctor-{os.getpid()}"
        write_text(probe, "")
        delete(probe)
    except StoreError as error:
        return CheckResult(WRONG, str(error))
    except OSError as error:
        return CheckResult(WRONG, f"`run.dir` {config.run.dir}: cannot be written ({error}); choose another")
    if not is_local(run_dir):
        return CheckResult(OK, f"`run.dir` {config.run.dir}: can be written")
    free = shutil.disk_usage(there).free
    told = f"`run.dir` {config.run.dir}: can be written, {free / 2**30:.1f} GiB free"
    return CheckResult(OK if free >= LITTLE_BYTES else WARN, told)


def _memory(config: Config) -> Iterator[CheckResult]:
    """Estimated peak of each role, compared with the memory of this machine's GPU."""
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
        yield CheckResult(OK, f"memory: by estimate every role fits {device.name} ({known.source})")


def _ray(config: Config | None, address: str | None) -> Iterator[CheckResult]:
    try:
        with ray_session(address=address):
            nodes, grows = cluster_nodes()
            cpus, gpus = sum(node.cpus for node in nodes), sum(len(node.gpus) for node in nodes)
            more = ", and an autoscaler that may add some" if grows else ""
            yield CheckResult(OK, f"Ray: nodes {len(nodes)}, CPUs {cpus:g}, GPUs {gpus}{more}")
            if config:
                told = check_cluster(config, steps_of(config))
                yield from (CheckResult(WARN, line) for line in told)
                if not told:
                    yield CheckResult(OK, "`resources`: every step fits")
    except CdpoError as error:
        yield CheckResult(WRONG, str(error))

"""The Ray that a run works on: the cluster it is in, the one that is named, or a local one with token access."""

import contextlib
import logging
import os
import re
import secrets
import warnings
from collections.abc import Iterator

from cdpo_ray import errors
from cdpo_ray.errors import CdpoError

MIN_LOCAL_CPUS = 4  # with fewer logical CPUs, pipelines of several actor pools starve

_ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else `uv run` uploads the working folder and starts workers through uv
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # reports are collected at this pace
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else workers' lines come twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor that asks for no GPU sees none
    "TOKENIZERS_PARALLELISM": "false",
    "DIFFUSERS_DISABLE_REMOTE_CODE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
_QUIET = ("ray.data", "ray.train", "ray.tune", "ray._private.worker", "ray.serve")


@contextlib.contextmanager
def ray_session(*, verbose: bool = False) -> Iterator[None]:
    """Connect to Ray for the block; a local Ray started here ends with it.

    Inside a Ray job, or with ``RAY_ADDRESS`` set, that cluster is used as it is.

    Args:
        verbose: show what workers print and what Ray logs.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    in_cluster = "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ
    if not in_cluster and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # for this process and its children only
    if not in_cluster and not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its core logs warnings of its own making as errors
    import ray  # the environment above is read at import
    import ray.data
    import ray.train
    from ray.util.annotations import RayDeprecationWarning

    warnings.filterwarnings("ignore", category=RayDeprecationWarning)  # from 2.64 on; the version is pinned

    already = ray.is_initialized()
    if not already:
        local = {} if in_cluster else {"address": "local", "num_cpus": max(MIN_LOCAL_CPUS, os.cpu_count() or 1)}
        ray.init(logging_level=logging.INFO if verbose else logging.ERROR, log_to_driver=verbose, **local)
    for name in () if verbose else _QUIET:
        for handler in logging.getLogger(name).handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL)  # what it would tell, it also raises
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # `Progress` has one of its own
    context.enable_operator_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.verbose_progress = False
    try:
        yield
    except ray.exceptions.RayError as error:
        raise _for_people(error) from error
    finally:
        if not already:
            ray.shutdown()


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

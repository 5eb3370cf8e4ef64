"""Models that tests share; built when the first test asks, so that tests without torch stay quick."""

import contextlib
import fcntl
import functools
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny nets gain nothing by two, and lose a hundredfold on a busy machine
# Ray's workers are nice by default: beside the tests of the other process they would wait for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray reads its mode of access when it is first imported, by whichever test that is: the same for all of them.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from cdpo_ray.testbed import PIPELINE_DIR

settings.register_profile("untimed", deadline=None)  # a busy machine must fail nothing; benchmarks hold the speed
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of its real architecture, narrow, with random weights; do not write into it.

    Variants of a family: `flux_schnell`, `flux2_distilled`.

    The processes of `pytest -n` share the folders: the first that needs a model builds it.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    @functools.cache
    def folder_of(family: str) -> Path:
        import tiny_models

        builders = {
            "stable_diffusion": tiny_models.build_tiny_sd15,
            "stable_diffusion_xl": tiny_models.build_tiny_sdxl,
            "latent_consistency": tiny_models.build_tiny_lcm,
            "stable_diffusion_3": tiny_models.build_tiny_sd3,
            "flux": tiny_models.build_tiny_flux,
            "qwen_image": tiny_models.build_tiny_qwen_image,
            "sana": tiny_models.build_tiny_sana,
            "flux_schnell": functools.partial(tiny_models.build_tiny_flux, guidance_embeds=False),
            "flux2": tiny_models.build_tiny_flux2,
            "flux2_distilled": functools.partial(tiny_models.build_tiny_flux2, is_distilled=True),
            "z_image": tiny_models.build_tiny_z_image,
        }
        folder = shared / f"tiny_{family}"
        with (shared / f"tiny_{family}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                builders[family](shared / f"tiny_{family}.partial").rename(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny_sd15(tiny_models: Callable[[str], Path]) -> Path:
    """Folder of the real SD1.5 architecture at a tenth of its width, random weights; do not write into it."""
    return tiny_models("stable_diffusion")


@pytest.fixture(scope="session")
def tiny_lcm(tiny_models: Callable[[str], Path]) -> Path:
    """Folder of a latent consistency model whose teacher would be `tiny_sd15`, random weights; do not write into it."""
    return tiny_models("latent_consistency")


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Folder of the shipped pipeline; skips where its weights are not there."""
    if not list(PIPELINE_DIR.glob("unet/*.safetensors")):
        pytest.skip(f"no weights in {PIPELINE_DIR}")
    return PIPELINE_DIR


@pytest.fixture(scope="session")
def until_the_last_test() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def local_ray(until_the_last_test: contextlib.ExitStack) -> None:
    """A local Ray for all modules, started again for the next one if it could not start or has ended.

    Its workers find the modules of this folder, such as `own_rewards`; `ray_session` joins it.
    """
    from cdpo_ray.session import ray_session

    if "ray" not in sys.modules or not sys.modules["ray"].is_initialized():  # the session imports it
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
            patch.setenv("RAY_metrics_report_interval_ms", "5000")  # a test waits for them
            until_the_last_test.enter_context(ray_session())


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Path]:
    from object_store import serve

    with serve() as bucket:
        yield bucket


@pytest.fixture
def s3(s3_server: Path) -> Iterator[Path]:
    """A bucket of a real S3 server, empty; `s3://bucket`."""
    from cdpo_ray.store import delete

    yield s3_server
    delete(s3_server)


@functools.cache
def starts_ray(path: Path) -> bool:
    """Whether a file has tests that start Ray."""
    return re.search(r"pytest\.mark\.ray\b", path.read_text()) is not None


def pytest_configure() -> None:
    """Restore the handler of SIGINT: pytest and its children ignore it if a shell started them in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fault's number is in the test's name; the marker follows from it. Under `pytest -n`, Ray comes first."""
    for item in items:
        if item.name.startswith("test_fault_"):
            item.add_marker(pytest.mark.fault)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not starts_ray(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n`, a file runs in one process, and files that start Ray in two: `test_run.py`, and all others.

    Each of the two has one local Ray, and they take about the same time. pytest-xdist 3.8 has `--dist loadgroup` for
    groups of files, which has no effect with pytest 9.2: it changes a node ID that pytest no longer reads.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayInTwoProcesses(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = config.rootpath / nodeid.partition("::")[0]
            return "ray" if starts_ray(file) and file.name != "test_run.py" else str(file)

    return RayInTwoProcesses(config, log)

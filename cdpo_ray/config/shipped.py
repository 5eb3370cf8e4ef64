"""Configs that come with the package."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from cdpo_ray.config.section import nearest
from cdpo_ray.errors import ConfigError, printable

PACKAGE_DIR = Path(__file__).parents[1]


@cache
def shipped_configs() -> Mapping[str, Path]:
    """Path of each config by its name, such as ``quickstart``; in a source tree, they are beside the package."""
    installed = PACKAGE_DIR / "configs"
    folder = installed if installed.is_dir() else PACKAGE_DIR.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_config(name: str) -> Path:
    """Path of a config by its name.

    Raises:
        ConfigError: there is no such config; suggests one.
    """
    known = shipped_configs()
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else f"the configs are {', '.join(known)}"
        raise ConfigError(f"{printable(name)}: is not a config of the package; {hint}")
    return known[name]


def purpose_of(path: Path) -> str:
    """First sentence of the comment at the top of a config."""
    lines = path.read_text("utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return re.split(r"(?<=\.)\s", " ".join(comment), maxsplit=1)[0]

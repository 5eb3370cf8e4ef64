"""Measurements of a training <-> JSON file beside the weights."""

import json
from pathlib import Path
from typing import Any


def save_figures(weights_dir: Path, part: str, figures: dict[str, Any]) -> None:
    """Write ``figures/<part>.json``, floats to four digits."""
    path = weights_dir / "figures" / f"{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}
    path.write_text(json.dumps(rounded, indent=2) + "\n")


def load_figures(weights_dir: Path, part: str) -> dict[str, Any]:
    """Read a file of ``save_figures``."""
    return dict(json.loads((weights_dir / "figures" / f"{part}.json").read_text()))

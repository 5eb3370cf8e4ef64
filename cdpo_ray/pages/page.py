"""Values and images -> one self-contained HTML page."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from cdpo_ray.dataflow.images import open_png
from cdpo_ray.errors import printable
from cdpo_ray.store import write_text

MAX_PIXELS = 256  # larger images are shrunk, so that the page stays of a size that opens
MAX_CELL_CHARS = 1000  # on a terminal
PIXELATED_BELOW = 128  # smaller images are enlarged without blur, which would hide what the model made

CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"}
"""U+2400 and on, in place of what HTML forbids and a terminal obeys; a prompt may hold any of it."""

HERE = Path(__file__).parent


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Fill in a template and write the page, whole or not at all; it needs no other file and no network.

    Args:
        template: a file that may extend and import those of this folder.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,  # prompts, names and warnings are text from elsewhere
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).render(**values).translate(CONTROL_PICTURES)
    write_text(path, page)


def inline_png(png: bytes, where: str) -> dict[str, Any]:
    """A PNG as a data URI, shrunk if it is large, with its size and whether to enlarge it without blur.

    Raises:
        StoreError: it is no PNG; ``where`` tells which.
    """
    image = open_png(png, where)
    if max(image.size) > MAX_PIXELS:
        image.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        png = buffer.getvalue()
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"uri": uri, "pixelated": max(image.size) < PIXELATED_BELOW, "width": image.width, "height": image.height}


def formatted_difference(comparison: Mapping[str, Any]) -> dict[str, str]:
    """`base`, `tuned`, `difference` and its `interval` as text, with two digits of the difference whatever the unit.

    Args:
        comparison: `statistics.Comparison` as plain values.
    """
    difference = comparison["difference"]
    places = decimal_places(difference)
    mean, ends = formatted_interval(difference)
    return {
        "base": format_number(comparison["base"]["mean"], places),
        "tuned": format_number(comparison["tuned"]["mean"], places),
        "difference": mean,
        "interval": ends,
    }


def formatted_interval(interval: Mapping[str, Any]) -> tuple[str, str]:
    """A mean difference and its interval as text, with two digits of the larger end."""
    places = decimal_places(interval)
    mean, low, high = (format_number(interval[end], places, "+") for end in ("mean", "low", "high"))
    return mean, f"[{low}, {high}]"


def decimal_places(interval: Mapping[str, Any]) -> int:
    """Decimal places that show two digits of the larger end of an interval."""
    largest = max(abs(interval["low"]), abs(interval["high"]))
    return min(6, max(0, 1 - math.floor(math.log10(largest)))) if largest > 0 else 3


def formatted_share(interval: Mapping[str, Any]) -> tuple[str, str]:
    """A mean of shares and its interval in per cent, as text."""
    mean, low, high = (f"{100 * interval[end]:.0f}" for end in ("mean", "low", "high"))
    return f"{mean} %", f"[{low}, {high}] %"


def significant_change(comparison: Mapping[str, Any]) -> int:
    """-1, 0 or 1: lower, none, higher; significant when the 95 % interval of the difference excludes 0."""
    return direction(comparison["difference"])


def direction(interval: Mapping[str, Any]) -> int:
    """-1, 0 or 1: below 0, not told apart from it, above; as the whole interval lies."""
    return int(interval["low"] > 0) - int(interval["high"] < 0)


def relative_change(comparison: Mapping[str, Any]) -> dict[str, float] | None:
    """The difference and the ends of its interval as shares of the base's mean; none where that is not above 0."""
    base = comparison["base"]["mean"]
    return {end: comparison["difference"][end] / base for end in ("mean", "low", "high")} if base > 0 else None


def format_number(value: float, places: int, sign: str = "-") -> str:
    return f"{value:{sign}.{places}f}".replace("-", "−")


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines for a terminal, a column as wide as its widest cell."""
    rows = [[printable(cell, MAX_CELL_CHARS) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )

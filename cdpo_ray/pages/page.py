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

MAX_PIXELS = 256  # longest side of an image; larger ones are shrunk to limit the size of the page
MAX_CELL_CHARS = 1000  # on a terminal
PIXELATED_BELOW = 128  # smaller images are enlarged without interpolation, which would hide the model's pixels

CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n\r"}
"""Control characters -> visible U+2400 and following; prompts may hold them, and HTML forbids them."""

HERE = Path(__file__).parent


def write_page(path: Path, template: Path, **values: Any) -> None:
    """Render a template and write the page atomically; the page needs no other file and no network.

    Args:
        path: path of the page.
        template: path of a Jinja template, which may extend and import those of this folder.
        values: variables of the template.

    Raises:
        StoreError: the storage fails.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,  # prompts, names and warnings are untrusted text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template.name).render(**values).translate(CONTROL_PICTURES)
    write_text(path, page)


def inline_png(png: bytes, where: str) -> dict[str, Any]:
    """PNG as a data URI, shrunk to `MAX_PIXELS`, with its size and whether to enlarge it without interpolation.

    Args:
        png: content of the PNG.
        where: file and row, for the message.

    Raises:
        StoreError: as `open_png`.
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
    """`base`, `tuned`, `difference` and its `interval` as text, with two significant digits of the difference.

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
    """Mean difference and its interval as text, with two significant digits of the larger end."""
    places = decimal_places(interval)
    mean, low, high = (format_number(interval[end], places, "+") for end in ("mean", "low", "high"))
    return mean, f"[{low}, {high}]"


def decimal_places(interval: Mapping[str, Any]) -> int:
    """Number of decimal places that show two significant digits of the larger end of an interval, 0 to 6."""
    largest = max(abs(interval["low"]), abs(interval["high"]))
    return min(6, max(0, 1 - math.floor(math.log10(largest)))) if largest > 0 else 3


def formatted_share(interval: Mapping[str, Any]) -> tuple[str, str]:
    """Mean of shares and its interval as text, in per cent."""
    mean, low, high = (f"{100 * interval[end]:.0f}" for end in ("mean", "low", "high"))
    return f"{mean} %", f"[{low}, {high}] %"


def significant_change(comparison: Mapping[str, Any]) -> int:
    """-1, 0 or 1: lower, no significant change, higher; significant if the 95 % interval excludes 0."""
    return direction(comparison["difference"])


def direction(interval: Mapping[str, Any]) -> int:
    """-1, 0 or 1: the whole interval is below 0, includes 0, or is above 0."""
    return int(interval["low"] > 0) - int(interval["high"] < 0)


def relative_change(comparison: Mapping[str, Any]) -> dict[str, float] | None:
    """Difference and the ends of its interval as fractions of the base's mean; ``None`` if that is not above 0."""
    base = comparison["base"]["mean"]
    return {end: comparison["difference"][end] / base for end in ("mean", "low", "high")} if base > 0 else None


def format_number(value: float, places: int, sign: str = "-") -> str:
    """Number with a fixed number of decimal places and a typographic minus; ``sign``: see `format`."""
    return f"{value:{sign}.{places}f}".replace("-", "−")


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines for a terminal, in aligned columns."""
    rows = [[printable(cell, MAX_CELL_CHARS) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )

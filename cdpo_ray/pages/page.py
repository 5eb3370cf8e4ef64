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

NO_INTERVAL = "[no interval]"
"""Text in place of an interval; a page that shows it also says why."""

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
    write_text(path, render(template, **values))


def render(template: Path, **values: Any) -> str:
    """Render a template of a page or of a part of one; arguments: see `write_page`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,  # prompts, names and warnings are untrusted text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values).translate(CONTROL_PICTURES)


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
        image = shrunk(image)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        png = buffer.getvalue()
    uri = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return {"uri": uri, "pixelated": max(image.size) < PIXELATED_BELOW, "width": image.width, "height": image.height}


def shrunk(image: Image.Image) -> Image.Image:
    """A copy whose longest side is at most `MAX_PIXELS`."""
    image = image.copy()
    image.thumbnail((MAX_PIXELS, MAX_PIXELS), Image.Resampling.LANCZOS)
    return image


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


def has_interval(estimate: Mapping[str, Any]) -> bool:
    """Whether a `statistics.Estimate`, as plain values, has an interval."""
    return "no_interval" not in estimate


def formatted_interval(estimate: Mapping[str, Any]) -> tuple[str, str]:
    """Mean difference and its interval as text, with two significant digits of the larger end."""
    places = decimal_places(estimate)
    mean = format_number(estimate["mean"], places, "+")
    if not has_interval(estimate):
        return mean, NO_INTERVAL
    low, high = (format_number(estimate[end], places, "+") for end in ("low", "high"))
    return mean, f"[{low}, {high}]"


def decimal_places(estimate: Mapping[str, Any]) -> int:
    """Number of decimal places, 0 to 6, for two significant digits of the interval's larger end, or of a lone mean."""
    largest = max(abs(estimate[end]) for end in (("low", "high") if has_interval(estimate) else ("mean",)))
    return min(6, max(0, 1 - math.floor(math.log10(largest)))) if largest > 0 else 3


def formatted_share(estimate: Mapping[str, Any]) -> tuple[str, str]:
    """Mean of shares and its interval as text, in per cent."""
    mean = f"{100 * estimate['mean']:.0f} %"
    if not has_interval(estimate):
        return mean, NO_INTERVAL
    return mean, f"[{100 * estimate['low']:.0f}, {100 * estimate['high']:.0f}] %"


def significant_change(comparison: Mapping[str, Any]) -> int | None:
    """-1, 0 or 1: lower, no significant change, higher, if the 95 % interval excludes 0; `None` without an interval."""
    return direction(comparison["difference"])


def direction(estimate: Mapping[str, Any], *, neutral: float = 0) -> int | None:
    """-1, 0 or 1: the whole interval is below ``neutral``, includes it, or is above it; `None` without an interval."""
    if not has_interval(estimate):
        return None
    return int(estimate["low"] > neutral) - int(estimate["high"] < neutral)


def error_bars(estimate: Mapping[str, Any]) -> list[list[float]] | None:
    """Distances of the interval's ends from the mean, for matplotlib's `errorbar`; `None` without an interval."""
    if not has_interval(estimate):
        return None
    mean = estimate["mean"]
    return [[max(0.0, mean - estimate["low"])], [max(0.0, estimate["high"] - mean)]]


def relative_change(comparison: Mapping[str, Any]) -> dict[str, Any] | None:
    """The difference as a fraction of the base's mean, as an estimate; ``None`` if that mean is not above 0."""
    base, difference = comparison["base"]["mean"], comparison["difference"]
    if base <= 0:
        return None
    return {**difference, **{end: difference[end] / base for end in ("mean", "low", "high") if end in difference}}


def reasons_without_interval(values: Any) -> list[str]:
    """Distinct reasons why estimates among plain values, at any depth, have no interval."""
    if isinstance(values, Mapping):
        if isinstance(reason := values.get("no_interval"), str):
            return [reason]
        values = [*values.values()]
    if isinstance(values, list):
        return [*dict.fromkeys(reason for value in values for reason in reasons_without_interval(value))]
    return []


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

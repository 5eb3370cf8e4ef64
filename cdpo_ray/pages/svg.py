"""A matplotlib figure -> SVG that stands within a page."""

import html
import io
import re

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH_INCHES = 4.5  # near the width of a phone, so that text keeps its size there


def blank_figure(height_inches: float, *, gap_inches: float = 3 / 72) -> Figure:
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout=ConstrainedLayoutEngine(h_pad=gap_inches))


def inline_svg(figure: Figure, description: str) -> str:
    """The bare element, to stand within HTML: no prolog, no metadata, no group names that would repeat on a page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)

"""Matplotlib figures as inline SVG."""

import html
import io
import re

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH_INCHES = 4.5  # about the width of a phone, so that text keeps its size there


def blank_figure(height_inches: float, *, gap_inches: float = 3 / 72) -> Figure:
    """Empty figure of `WIDTH_INCHES`; ``gap_inches``: vertical padding of the axes."""
    return Figure(figsize=(WIDTH_INCHES, height_inches), layout=ConstrainedLayoutEngine(h_pad=gap_inches))


def inline_svg(figure: Figure, description: str) -> str:
    """SVG element for inline use in HTML: no prolog, no metadata, and no ids of groups, which would repeat on a page.

    Args:
        description: label for screen readers.
    """
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(buffer, format="svg", metadata=no_metadata, transparent=True)
    text = buffer.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)

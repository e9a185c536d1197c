"""Matplotlib figures as inline SVG that takes its colours from the page, so that they are readable light and dark.

Matplotlib draws in stand-in colours; `inline` replaces them by CSS variables and the font by the page's own.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from kvpipe.report.collect import ROLES

WIDTH = 9.9
"""Inches of a full-width figure; an inch is 96 pixels on the page."""

_NAMES = ("ink", "soft", "grid", "paper", *ROLES, *(f"series-{i}" for i in range(1, 7)))
STAND_IN = {name: f"#0100{i:02x}" for i, name in enumerate(_NAMES)}
INK, SOFT, GRID, PAPER = (STAND_IN[name] for name in ("ink", "soft", "grid", "paper"))
SERIES = [STAND_IN[f"series-{i}"] for i in range(1, 7)]
DASHES = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (8, 2))]
MONOSPACE = "DejaVu Sans Mono"

STYLE: Any = {
    "svg.hashsalt": "kvpipe",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.4,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Picture:
    """An inline SVG with its description for those who cannot see it."""

    svg: str
    alt: str


@contextmanager
def styled():
    """Matplotlib under the report's style, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def inline(figure: Figure, alt: str) -> Picture:
    """The figure as an `<svg>` element without ids of groups, namespaces, metadata or fixed text colours."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for name, colour in STAND_IN.items():
        text = text.replace(colour, f"var(--{name})")
    text = text.replace(f"'{MONOSPACE}'", "var(--mono)").replace("'DejaVu Sans'", "var(--sans)")
    text = re.sub(r"<svg ", f'<svg role="img" aria-label="{_attribute(alt)}" ', text, count=1)
    return Picture(text, alt)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")

"""One style for every figure: matplotlib in the light palette; files with their fonts, and SVG in the page's colours."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

LIGHT = {
    "paper": "#ffffff", "raised": "#f5f6f8", "ink": "#1a1d21", "soft": "#626973", "grid": "#e1e4e8", "link": "#0b5cad",
    "control": "#4d5560", "experiment": "#0072b2", "ablation": "#00805f", "baseline": "#9a5b00", "null": "#a94a86",
    "orange": "#c04f00", "olive": "#7a6a00", "good": "#00704f", "bad": "#b3261e", "mark": "#fff3d6",
}  # fmt: skip
DARK = {
    "paper": "#14171b", "raised": "#1e2228", "ink": "#e4e7eb", "soft": "#9aa3ae", "grid": "#333a43", "link": "#7ab8f5",
    "control": "#b4bcc6", "experiment": "#56b4e9", "ablation": "#2fc79b", "baseline": "#e69f00", "null": "#e09bc3",
    "orange": "#f0803c", "olive": "#e6c34d", "good": "#3fd0a0", "bad": "#ff8a80", "mark": "#3d3318",
}  # fmt: skip
"""Colours by their name on the page. All but paper, raised, grid and mark are read on paper or carry its colour as text:
at least 4.5:1."""
INK, SOFT, GRID, PAPER = (LIGHT[name] for name in ("ink", "soft", "grid", "paper"))
SERIES = [LIGHT[name] for name in ("experiment", "orange", "ablation", "null", "olive", "control")]
DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (8, 2))]
MONOSPACE = "DejaVu Sans Mono"
WIDTH = 9.9
"""Inches of a full-width figure; an inch is 96 pixels on the page."""

_STYLE: Any = {
    "svg.hashsalt": "kvpipe",
    "pdf.fonttype": 42,
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
    "grid.color": GRID,
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


@contextmanager
def styled():
    """Matplotlib under this style, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def save_figure(figure: Figure, stem: Path) -> None:
    """`stem` as SVG, its text as outlines, and as PDF with TrueType fonts inside; the same bytes every time."""
    with styled():
        figure.savefig(stem.with_suffix(".svg"), facecolor=PAPER, metadata={"Date": None})
        figure.savefig(stem.with_suffix(".pdf"), facecolor=PAPER, metadata={"CreationDate": None})


def inline(figure: Figure, alt: str) -> Markup:
    """The figure as an `<svg>` element whose colours and fonts are the page's."""
    buffer = StringIO()
    with styled(), matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text: the reader's fonts have it
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    for pattern in (r"<metadata>.*?</metadata>\s*", r"<!--.*?-->\s*", r' xmlns(:\w+)?="[^"]*"', r'(?<=<g) id="[^"]*"'):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    text = text.replace(f"'{MONOSPACE}'", "var(--mono)").replace("'DejaVu Sans'", "var(--sans)")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(alt)}" ', 1))


def on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever is read better on a colour of red, green and blue in 0 … 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "#000000" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.179 else "#fefefe"


def nothing(name: str) -> Figure:
    """What stands where the results hold nothing for a figure."""
    with styled():
        figure = Figure(figsize=(WIDTH, 0.8))
        figure.text(0.01, 0.5, f"{name}: these results hold nothing to draw.", color=SOFT, va="center")
    return figure

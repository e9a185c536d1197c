"""Draws alignment.svg: the path of one teacher's cache to the student's positions (docs/method/).

    python docs/figures/alignment.py

Tokens and links are real: the shipped `math` teacher, the shipped student, and
`kvpipe.tokens.matrix.overlap` in its causal mode.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from kvpipe.models.folders import load_tokenizer
from kvpipe.tokens.matrix import encode
from kvpipe.tokens.show import alignment_rows, visible

ROOT = Path(__file__).parents[2]
TEXT = "Ann has 17 pens, buys 12."
TEACHER, STUDENT, TARGET, INK, SOFT = "#b4532a", "#2a6fb4", "#6b4fa0", "#222222", "#777777"
CELL = 0.42


def main() -> None:
    """Writes docs/figures/alignment.svg."""
    teacher, student = (load_tokenizer(ROOT / "config" / "embedded" / name) for name in ("math", "student"))
    rows = [row for row in alignment_rows(teacher, student, TEXT, "causal") if row["stop"] > row["start"]]
    src = [(a, b) for a, b in encode(teacher, TEXT).spans.tolist() if b > a]
    dst = [(row["start"], row["stop"]) for row in rows]

    matplotlib.rcParams.update({"svg.hashsalt": "kvpipe", "svg.fonttype": "none", "font.size": 8.5})
    figure = Figure(figsize=(9.6, 6.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-10.5, 41.5), ylim=(-18.4, 1.2))
    axes.axis("off")

    cells(axes, src, 0.0, 4, TEACHER)
    tokens(axes, src, -2.2, TEACHER)
    label(
        axes,
        -0.4,
        "teacher's cache",
        "keys turned back by its rotary\nembedding: K = R(position)⁻¹ · cached",
        "4 layers, 4 heads × 16",
    )
    label(axes, -2.2, "its tokens", "", f"vocabulary of {len(teacher)}")
    for row in rows:
        for source in row["sources"]:
            x = (source["start"] + source["stop"]) / 2, (row["start"] + row["stop"]) / 2
            axes.plot(x, (-2.65, -4.25), color=SOFT, linewidth=0.4 + source["weight"], alpha=0.8)
    label(axes, -3.45, "time", "causal overlap A of byte spans", "rows of A sum to 1, or are masked")
    cells(axes, dst, -4.4, 4, TEACHER)
    arrow(axes, -6.25, -7.15)
    label(axes, -5.2, "", "the cache at the student's positions", "4 layers, 4 heads × 16")
    label(axes, -6.7, "layer", "depth, or top-k by CKA with weights β", "Σβ = 1")
    cells(axes, dst, -7.3, 3, TEACHER)
    arrow(axes, -8.75, -9.65)
    label(axes, -9.2, "heads, dimension", "fitted before training, then frozen", "4 × 16 → 2 × 16")
    cells(axes, dst, -9.8, 3, TARGET)
    arrow(axes, -11.25, -12.15)
    label(axes, -10.4, "", "in the space that all teachers share", "3 layers, 2 heads × 16")
    label(axes, -11.7, "fusion", "Σ w · target over the teachers", "Σw = 1")
    cells(axes, dst, -12.3, 3, TARGET)
    for start, stop in dst:
        x = (start + stop) / 2
        axes.plot((x, x), (-13.65, -14.35), color=INK, linewidth=0.8, linestyle=(0, (1, 1)))
    label(axes, -12.9, "target", "", "3 layers, 2 heads × 16")
    label(axes, -13.9, "loss", "λ · mean of (student − target)² / σ²", "K and V apart, each with its own λ")
    cells(axes, dst, -14.5, 3, STUDENT)
    tokens(axes, dst, -16.3, STUDENT)
    label(
        axes,
        -15.15,
        "student's cache",
        "recorded in its own forward,\nwith gradient, before rotation",
        "3 layers, 2 heads × 16",
    )
    label(axes, -16.3, "its tokens", "", "vocabulary of 384")
    axes.text(-10.2, -17.75, "Columns are tokens over one byte axis, small squares are layers.", color=SOFT)

    path = Path(__file__).with_suffix(".svg")
    figure.savefig(path, metadata={"Date": None})
    # matplotlib leaves spaces at the ends of lines
    path.write_text("\n".join(line.rstrip() for line in path.read_text("utf-8").splitlines()) + "\n", "utf-8")


def cells(axes: Axes, spans: list[tuple[int, int]], top: float, layers: int, colour: str) -> None:
    """A column of one square per layer over every token."""
    for start, stop in spans:
        for layer in range(layers):
            corner = ((start + stop) / 2 - CELL / 2, top - (layer + 1) * CELL)
            axes.add_patch(Rectangle(corner, CELL * 0.86, CELL * 0.86, facecolor=colour, alpha=0.45 + 0.15 * layer))


def tokens(axes: Axes, spans: list[tuple[int, int]], y: float, colour: str) -> None:
    """The tokens' text in boxes over their bytes."""
    for start, stop in spans:
        box = FancyBboxPatch(
            (start + 0.06, y - 0.38), stop - start - 0.12, 0.76, boxstyle="round,pad=0,rounding_size=0.15",
            facecolor="none", edgecolor=colour, linewidth=0.9,
        )  # fmt: skip
        axes.add_patch(box)
        text = visible(TEXT.encode()[start:stop].decode())
        axes.text((start + stop) / 2, y, text, ha="center", va="center_baseline", family="DejaVu Sans Mono", size=7.5)


def arrow(axes: Axes, top: float, bottom: float) -> None:
    """What comes out of a step below what went in."""
    axes.annotate("", (len(TEXT) / 2, bottom), (len(TEXT) / 2, top), arrowprops={"arrowstyle": "-|>", "color": INK})


def label(axes: Axes, y: float, name: str, what: str, shape: str) -> None:
    """Step and formula on the left, shape on the right."""
    axes.text(-10.2, y + (0.35 if what and name else 0), name, weight="bold", va="center", color=INK)
    lines = what.count("\n")
    axes.text(-10.2, y - (0.25 + 0.25 * lines if name else 0), what, va="center", color=SOFT, size=6.8)
    axes.text(31.2, y, shape, va="center", color=INK, size=7.5)


if __name__ == "__main__":
    main()

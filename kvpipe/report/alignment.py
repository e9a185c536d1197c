"""A picture of one text under two tokenizers and of the weights that carry a teacher's cache to the student's tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from kvpipe.data.records import Record, render
from kvpipe.report.collect import Results
from kvpipe.report.style import MONOSPACE, SERIES, SOFT, WIDTH, styled
from kvpipe.tokens.matrix import Mode, encode
from kvpipe.tokens.show import alignment_rows, visible

BYTES_PER_LINE = 82
LINES = 2
TOKENIZER = "tokenizer.json"


def shown_example(results: Results) -> tuple[str, Record] | None:
    """A validation example of the first task, so that no test item is shown twice, and the teacher whose tokens of it
    differ most from the student's. Models of random weights share their original's tokenizer and are left out."""
    names = [results.config.student, *results.dag.judged_teachers]
    names = [name for name in names if (results.paths.model(name) / TOKENIZER).is_file()]
    record = next((r for r in results.records("validation") if r.task == results.tasks[0]), None)
    if record is None or results.config.student not in names or len(names) < 2:
        return None
    text = render(record, results.config.data.template).text
    own, *others = ({tuple(s) for s in encode(results.tokenizer(name), text).spans.tolist()} for name in names)
    differences = [len(own ^ spans) for spans in others]
    return names[1 + differences.index(max(differences))], record


def time_mode(results: Results) -> Mode:
    """How the arms share tokens out; of the first that does."""
    return next((a.time.mode for a in results.dag.arms.values() if a.teachers and a.time.kind == "overlap"), "causal")


def token_alignment(results: Results) -> Figure | None:
    """One example: a teacher's tokens above, the student's below, and the weights that join them."""
    found = shown_example(results)
    if found is None:
        return None
    teacher, record = found
    teacher_tokenizer, student_tokenizer = (results.tokenizer(name) for name in (teacher, results.config.student))
    text = render(record, results.config.data.template).text
    return draw_alignment(teacher_tokenizer, student_tokenizer, text, time_mode(results))


def draw_alignment(teacher_tokenizer: Any, student_tokenizer: Any, text: str, mode: Mode) -> Figure:
    """The beginning of a text: the teacher's tokens above, the student's below, and the weights that join them."""
    rows = alignment_rows(teacher_tokenizer, student_tokenizer, text, mode)
    spans = encode(teacher_tokenizer, text).spans.tolist()
    pieces = [(start, stop) for start, stop in spans if stop > start]
    starts = _line_starts({a for a, _ in pieces} & {r["start"] for r in rows}, len(text.encode()))
    with styled():
        figure = Figure(figsize=(WIDTH, 1.12 * len(starts)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(-9, BYTES_PER_LINE + 1)
        axes.set_ylim(-3.35 * len(starts) + 0.35, 0.55)
        axes.axis("off")
        data = text.encode()
        for line, (low, high) in enumerate(starts):
            top, bottom = -3.35 * line - 0.35, -3.35 * line - 2.2
            axes.text(-0.8, top, "teacher", ha="right", va="center", color=SERIES[1], weight="bold")
            axes.text(-0.8, bottom, "student", ha="right", va="center", color=SERIES[0], weight="bold")
            for start, stop in pieces:
                if low <= start < high:
                    _token(axes, start - low, stop - low, top, _text(data[start:stop]), SERIES[1])
            for row in rows:
                if not (low <= row["start"] < high and row["stop"] > row["start"]):
                    continue
                _token(axes, row["start"] - low, row["stop"] - low, bottom, visible(row["text"]), SERIES[0])
                _links(axes, row, low, high, top - 0.45, bottom + 0.45)
    return figure


def _line_starts(shared: set[int], length: int) -> list[tuple[int, int]]:
    """Byte ranges of the lines, cut where a token begins on both sides."""
    lines: list[tuple[int, int]] = []
    low = 0
    while low < length and len(lines) < LINES:
        ends = [s for s in shared if low < s <= low + BYTES_PER_LINE]
        high = length if length - low <= BYTES_PER_LINE else max(ends, default=low + BYTES_PER_LINE)
        lines.append((low, high))
        low = high
    return lines


def _token(axes: Axes, start: int, stop: int, y: float, text: str, colour: str) -> None:
    for look in ({"facecolor": colour, "alpha": 0.16, "edgecolor": "none"}, {"facecolor": "none", "edgecolor": colour}):
        shape: Any = {"boxstyle": "round,pad=0,rounding_size=0.18", "mutation_aspect": 1, "linewidth": 0.8, **look}
        axes.add_patch(FancyBboxPatch((start + 0.08, y - 0.4), stop - start - 0.16, 0.8, **shape))
    axes.text((start + stop) / 2, y, text, ha="center", va="center_baseline", family=MONOSPACE, size=8.5)


def _links(axes: Axes, row: dict, low: int, high: int, top: float, bottom: float) -> None:
    x = (row["start"] + row["stop"]) / 2 - low
    if not row["sources"]:
        axes.plot([x], [bottom + 0.12], marker="x", color=SOFT, markersize=4)
        return
    for source in row["sources"]:
        if source["start"] < low or source["start"] >= high:
            continue
        other = (source["start"] + source["stop"]) / 2 - low
        middle = (top + bottom) / 2
        path = np.array([[x, bottom], [x, middle], [other, middle], [other, top]])
        t = np.linspace(0, 1, 13)[:, None]
        curve = (1 - t) ** 3 * path[0] + 3 * (1 - t) ** 2 * t * path[1] + 3 * (1 - t) * t**2 * path[2] + t**3 * path[3]
        axes.plot(*curve.T, color=SOFT, linewidth=0.4 + 2.0 * source["weight"], alpha=0.8, zorder=0,
                  solid_capstyle="butt")  # fmt: skip


def _text(piece: bytes) -> str:
    return visible(piece.decode("utf-8", errors="replace"))

"""What a table of the report is: text in every cell; as CSV, LaTeX and, by `macros.html`, HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from kvpipe.experiment.files import replacing
from kvpipe.report.collect import Results

SIGNS = str.maketrans({"−": "$-$", "×": r"$\times$", "–": "--", "’": "'", "∞": r"$\infty$"})
"""Signs of these tables that LaTeX does not read."""


@dataclass(frozen=True)
class Cell:
    """One entry: text, interval beneath it, a footnote letter, and classes of the page's style."""

    text: str
    interval: str = ""
    note: str = ""
    css: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row, what it is of, and the group that it stands in; `depth` moves its name in."""

    name: str
    cells: list[Cell]
    label: str = ""
    role: str = ""
    group: str = ""
    depth: int = 0


@dataclass(frozen=True)
class Column:
    """A head; `over` spans all neighbours that have the same."""

    label: str
    unit: str = ""
    over: str = ""
    number: bool = True


@dataclass
class Table:
    """A table; `first` is the head over the rows' names."""

    caption: str
    first: str
    columns: list[Column]
    rows: list[TableRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, *cells: str | Cell, **row: Any) -> None:
        """One more row."""
        self.rows.append(TableRow(name, [Cell(c) if isinstance(c, str) else c for c in cells], **row))

    def arm(self, results: Results, arm: str, *cells: str | Cell, group: str = "", depth: int = 0) -> None:
        """A row of an arm."""
        label = results.dag.arms[arm].label if arm in results.dag.arms else "the student before training"
        self.add(arm, *cells, label=label, role=results.role(arm), group=group, depth=depth)

    def letter(self, note: str) -> str:
        """The letter of a footnote, in the order of first use."""
        if note not in self.notes:
            self.notes.append(note)
        return chr(ord("a") + self.notes.index(note))

    @property
    def groups(self) -> list[tuple[str, list[TableRow]]]:
        """Rows by their group."""
        names = dict.fromkeys(row.group for row in self.rows)
        return [(name, [row for row in self.rows if row.group == name]) for name in names]

    @property
    def overs(self) -> list[tuple[str, int]]:
        """Heads over the heads, each with how many columns it spans; none where no column has one."""
        found: list[tuple[str, int]] = []
        for over in (column.over for column in self.columns):
            if found and found[-1][0] == over:
                found[-1] = over, found[-1][1] + 1
            else:
                found.append((over, 1))
        return found if any(over for over, _ in found) else []

    def frame(self) -> pd.DataFrame:
        """Its text alone."""
        heads = [", ".join(filter(None, (c.over, c.label, c.unit))) for c in self.columns]
        rows = [[c.text + (f" ({c.interval})" if c.interval else "") for c in row.cells] for row in self.rows]
        grouped = len(self.groups) > 1
        names = [[row.group, row.name] if grouped else [row.name] for row in self.rows]
        first = ["group", self.first] if grouped else [self.first]
        return pd.DataFrame([[*n, *row] for n, row in zip(names, rows, strict=True)], columns=[*first, *heads])

    def write(self, stem: Path) -> None:
        """`stem` as CSV and as LaTeX (booktabs)."""
        frame = self.frame()
        style = frame.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
        left = len(frame.columns) - len(self.columns)
        columns = "l" * left + "".join("r" if column.number else "l" for column in self.columns)
        caption = re.sub(r"([&%$#_{}])", r"\\\1", self.caption)
        tex = style.to_latex(hrules=True, column_format=columns, caption=caption, position_float="centering")
        tex = tex.translate(SIGNS)
        for suffix, text in ((".csv", frame.to_csv(index=False)), (".tex", tex)):
            with replacing(stem.with_suffix(suffix)) as partial:
                partial.write_text(text, encoding="utf-8")

"""What was found, as tables for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from kvpipe.experiment.files import GB
from kvpipe.preflight.costs import Preflight

NOT_COUNTED = "not counted: the data step, downloads, lm-evaluation-harness, cache_swap, tables, the report"


def as_tables(found: Preflight) -> Group:
    """Three tables: terms, cells, rules."""
    terms = Table(title="Terms before training, mean of some batches", title_justify="left", caption_justify="left")
    terms.caption = "gradient: weighted, relative to cross-entropy's; suggested: all together pull as hard as it"
    for name in ("arm", "term", "value", "weight", "gradient", "suggested weight"):
        terms.add_column(name, justify="left" if name in ("arm", "term") else "right")
    for one in found.terms:
        numbers = (one.value, one.weight, one.gradient, one.suggested)
        terms.add_row(one.arm, one.term, *("–" if x is None else f"{x:.2g}" for x in numbers))
    cells = Table(title="A cell of each arm", title_justify="left")
    for name in ("arm", "step", "hours", "peak memory"):
        cells.add_column(name, justify="left" if name == "arm" else "right")
    for cell in found.cells:
        cells.add_row(cell.arm, f"{cell.step_seconds:.3g} s", f"{cell.hours:.3g}", f"{cell.peak / GB:.2f} GB")
    rules = Table(title="The whole grid, one job after the other", title_justify="left", caption=NOT_COUNTED)
    rules.caption_justify = "left"
    for name in ("rule", "jobs", "hours", "peak memory", "announced", "disk"):
        rules.add_column(name, justify="left" if name == "rule" else "right")
    for cost in found.rules:
        said = "" if cost.announced is None else f"{cost.announced / GB:.2f} GB"
        rules.add_row(
            cost.rule, str(cost.jobs), f"{cost.hours:.3g}", f"{cost.peak / GB:.2f} GB", said, f"{cost.disk / GB:.3g} GB"
        )
    rules.add_section()
    rules.add_row("all", "", f"{found.hours:.3g}", "", "", f"{found.disk / GB:.3g} GB")
    return Group(terms, cells, rules)

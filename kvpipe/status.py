"""The grid of cells: done, running, failed or missing, with time and memory."""

from __future__ import annotations

import json
import time

from rich.markup import escape
from rich.table import Table

from kvpipe.dag import Dag, Paths

RUNNING_WITHIN = 600
"""A cell counts as running while its log or checkpoints changed in the last so many seconds."""


def cell_state(paths: Paths, arm: str, seed: int) -> tuple[str, str]:
    """(state, detail) of one cell."""
    cost = paths.cell(arm, seed) / "cost.json"
    if cost.is_file():
        found = json.loads(cost.read_text(encoding="utf-8"))
        state = "done" if paths.items(arm, seed).is_file() else "trained"
        return state, f"{found['train_seconds']:.0f} s, {found['peak_memory_bytes'] / 1e9:.2f} GB"
    log = paths.root / "logs" / "train" / arm / f"seed{seed}.log"
    traces = [log, *paths.checkpoints(arm, seed).glob("step-*")]
    newest = max((p.stat().st_mtime for p in traces if p.exists()), default=None)
    if newest is None:
        return "missing", ""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    # the command line ends an error with a hint on a line of its own
    errors = [line for line in lines[-2:] if "Error" in line]
    state = "running" if time.time() - newest < RUNNING_WITHIN and not errors else "failed"
    return state, (errors or lines[-1:] or [""])[0][:60]


COLOURS = {"done": "green", "trained": "cyan", "running": "yellow", "failed": "red", "missing": "dim"}


def grid(dag: Dag, paths: Paths) -> Table:
    """Arms × seeds."""
    table = Table(title=f"{sum(cell_state(paths, *c)[0] == 'done' for c in dag.cells)} of {len(dag.cells)} cells done")
    table.add_column("arm")
    for seed in dag.config.seeds:
        table.add_column(f"seed {seed}")
    for arm in dag.arms:
        states = [cell_state(paths, arm, seed) for seed in dag.config.seeds]
        table.add_row(arm, *(f"[{COLOURS[s]}]{s}[/] {escape(detail)}" for s, detail in states))
    return table

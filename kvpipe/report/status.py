"""The grid of cells, and what they have cost: done, running, failed or missing, with time, memory and restarts."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvpipe.config.errors import printable
from kvpipe.experiment.attempts import record_of, total
from kvpipe.experiment.files import read_json
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag

RUNNING_WITHIN = 600
"""A cell counts as running while its log, checkpoints or record changed in the last so many seconds."""
ERRORS = ("CheckpointMismatch", "CheckpointNotWritten", "OutOfMemory", "NoDevice", "Killed", "SavedStudentDiffers")
"""How a log ends that has no line with `Error`."""
STOPPED = "stopped by signal"
"""The line of a run that has saved its state and goes on with the same command."""
COLOURS = {
    "done": "green",
    "trained": "cyan",
    "running": "yellow",
    "stopped": "yellow",
    "failed": "red",
    "missing": "dim",
}


@dataclass(frozen=True)
class Cell:
    """What can be said of one cell."""

    arm: str
    seed: int
    state: str
    detail: str = ""
    log: Path | None = None
    attempts: int = 0
    wall_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory: float = 0.0


def cell(paths: Paths, arm: str, seed: int) -> Cell:
    """State and cost of one cell, from what it has left on disk."""
    spent = total(record_of(paths.checkpoints(arm, seed))) or {}
    cost = paths.cost(arm, seed)
    if cost.is_file():
        found = read_json(cost, "train the cell again", ("train_seconds", "peak_memory_bytes"))
        items = paths.items(arm, seed)
        # scores of other weights are those of another student
        scored = items.is_file() and scored_model(items) == found.get("model", {}).get("digest")
        state = "done" if scored else "trained"
        detail = f"{found['train_seconds']:.0f} s, {found['peak_memory_bytes'] / 1e9:.2f} GB"
        # made before attempts were recorded: the steps' own time
        spent = {"attempts": found.get("restarts", 0) + 1, "wall_seconds": found["train_seconds"], **found}
        return _cell(arm, seed, state, detail, None, spent)
    log = _newest_log(paths, arm, seed)
    record = record_of(paths.checkpoints(arm, seed))
    traces = [record, *([log] if log else []), *paths.checkpoints(arm, seed).glob("step-*")]
    newest = max((p.stat().st_mtime for p in traces if p.exists()), default=None)
    if newest is None:
        return Cell(arm, seed, "missing")
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log else []
    # the command line ends an error with a hint on a line of its own
    errors = [line for line in lines[-2:] if "Error" in line or line.startswith(ERRORS)]
    # what Python says at its end, after its files have gone with the image, is no failure of the cell
    stopped = [line for line in lines if line.startswith(STOPPED)]
    state = "running" if time.time() - newest < RUNNING_WITHIN and not (errors or stopped) else "failed"
    return _cell(arm, seed, "stopped" if stopped else state, (stopped or errors or lines[-1:] or [""])[0], log, spent)


def scored_model(items: Path) -> str | None:
    """The digest of the model that a table of scores is of; None where it does not say, or is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        metadata = pyarrow.parquet.read_schema(items).metadata
        return json.loads(metadata[b"PANDAS_ATTRS"]).get("model")
    return None


def _newest_log(paths: Paths, arm: str, seed: int) -> Path | None:
    """The log of the last attempt, of a cell that has one for each (`seed0.log`, `seed0.1.log` …)."""
    folder = paths.log(f"train/{arm}/seed{seed}").parent
    found = [*folder.glob(f"seed{seed}.log"), *folder.glob(f"seed{seed}[.-]*.log"), *folder.glob(f"seed{seed}/*.log")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _cell(arm: str, seed: int, state: str, detail: str, log: Path | None, spent: dict) -> Cell:
    return Cell(
        arm,
        seed,
        state,
        printable(detail),
        log,
        attempts=spent.get("attempts", 0),
        wall_seconds=float(spent.get("wall_seconds", 0)),
        gpu_seconds=float(spent.get("gpu_seconds", 0)),
        peak_memory=float(spent.get("peak_memory_bytes", 0)),
    )


# ---------------------------------------------------------------- shown
def overview(dag: Dag, paths: Paths) -> Group:
    """The grid of cells, what they cost together, and of failed and stopped ones why, and where the log is."""
    cells = {(arm, seed): cell(paths, arm, seed) for arm, seed in dag.cells}
    return Group(grid(dag, cells), *totals(cells), *failures(cells))


def grid(dag: Dag, cells: dict[tuple[str, int], Cell]) -> Table:
    """Arms × seeds, each cell with its state and what all its attempts cost."""
    table = Table(title=f"{sum(c.state == 'done' for c in cells.values())} of {len(cells)} cells done")
    table.add_column("arm")
    for seed in dag.config.seeds:
        table.add_column(f"seed {seed}")
    for arm in dag.arms:
        row = [cells[arm, seed] for seed in dag.config.seeds]
        table.add_row(arm, *(Text.assemble((c.state, COLOURS[c.state]), f" {_in_grid(c)}") for c in row))
    return table


def _in_grid(c: Cell) -> str:
    """Of a failed or stopped cell the reason stands below the grid."""
    finished = c.state in ("done", "trained")
    said = "" if c.state in ("failed", "stopped") else c.detail[:60]
    spent = "" if finished or not c.attempts else f"{_duration(c.wall_seconds)}, {c.peak_memory / 1e9:.2f} GB"
    return ", ".join(filter(None, (said, spent, _count(c.attempts - 1, "restart") if c.attempts > 1 else "")))


def totals(cells: dict[tuple[str, int], Cell]) -> list[Text]:
    """One line: the cost of all attempts of all cells, those that were killed too; none while nothing has begun."""
    begun = [c for c in cells.values() if c.attempts]
    if not begun:
        return []
    gpu_seconds = sum(c.gpu_seconds for c in begun)
    parts = [
        _duration(sum(c.wall_seconds for c in begun)),
        f"{gpu_seconds / 3600:.2f} GPU hours" if gpu_seconds else "",
        f"at most {max(c.peak_memory for c in begun) / 1e9:.2f} GB",
        _count(sum(c.attempts - 1 for c in begun), "restart"),
    ]
    return [Text(f"training so far, all attempts of {_count(len(begun), 'cell')}: {', '.join(filter(None, parts))}")]


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def failures(cells: dict[tuple[str, int], Cell]) -> list[Text]:
    """One paragraph for each failed or stopped cell: how its log ends, and where it is."""
    return [
        Text(f"{c.state}: {c.arm} seed {c.seed}: {c.detail or 'no output'}\n        {c.log or 'no log'}")
        for c in cells.values()
        if c.state in ("failed", "stopped")
    ]

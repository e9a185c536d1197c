"""What cells leave on disk → scores: per item, of the validation curve, of the cost; per arm, metric and task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kvpipe.experiment.files import read_json, read_table
from kvpipe.experiment.paths import COST, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.stats.metrics import ITEM_METRICS, METRICS

ALL = "all"
UNTRAINED = "untrained"
CELL = "cell"
"""Attribute of a table of items: the arm and seed whose scores they are, None for a model that is no cell."""
ITEM_COLUMNS = ("id", "task", "nll", "tokens", "bytes", "nll_all", "tokens_all", "bytes_all", "correct")
"""Columns that every table of items has."""
Parts = list[NDArray[np.float64]]
"""One matrix ``(seed, item)`` for each task: the metric is the mean of their means; NaN where a cell is missing."""


# ---------------------------------------------------------------- reading
def read_items(paths: Paths, arm: str, seeds: list[int]) -> pd.DataFrame:
    """All items of an arm with columns `seed`, `model`, the digest of the weights, and `judge`; only cells that exist.

    Raises:
        ValueError: a number is not finite, or the scores are of another cell, or of other weights than it has now.
    """
    frames = []
    for seed in seeds:
        path = paths.items(arm, seed)
        if not path.is_file():
            continue
        items = read_table(path, "evaluate the cell again", ITEM_COLUMNS)
        # scores of earlier versions do not say whose they are
        whose = items.attrs.pop(CELL, {"arm": arm, "seed": seed})
        if whose != {"arm": arm, "seed": seed}:
            owner = f"arm {whose['arm']}, seed {whose['seed']}" if whose else "a model that is no cell"
            raise ValueError(
                f"{path}: these are the scores of {owner}, not of arm {arm}, seed {seed}; score the cell again"
            )
        # a number that is missing would pass for a missing cell
        for column in items.select_dtypes("number"):
            bad = items.id[~np.isfinite(items[column])]
            if len(bad):
                raise ValueError(
                    f"{path}: {column} of item {bad.iloc[0]} is not finite ({len(bad)} items); score it again"
                )
        scored = items.attrs.get("model", "")
        trained = read_cost(paths, arm, seed).get("model", {}).get("digest", "")
        if scored and trained and scored != trained:
            raise ValueError(
                f"{path} has the scores of a model {scored}, {paths.cell(arm, seed)} is {trained}: evaluate the cell again"
            )
        judges = items.attrs.pop("judges", {})
        frames.append(items.assign(seed=seed, model=scored, judge=items.task.map(judges).fillna("")))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"seed": [], "model": [], "judge": []})


def cell_of(model: Path) -> dict[str, Any] | None:
    """Arm and seed of the cell that a model folder belongs to; None for every other model."""
    path = model.parent / COST
    if not path.is_file():
        return None
    provenance = read_json(path, "train the cell again").get("provenance", {})
    return {key: provenance.get(key) for key in ("arm", "seed")}


def read_cost(paths: Paths, arm: str, seed: int) -> dict[str, Any]:
    """What a cell cost; empty where it is not trained.

    Raises:
        ValueError: the file is no JSON object, or is another cell's.
    """
    path = paths.cost(arm, seed)
    if not path.is_file():
        return {}
    cost = read_json(path, "train the cell again")
    provenance = cost.get("provenance", {})
    if provenance.get("arm", arm) != arm or provenance.get("seed", seed) != seed:
        whose = f"arm {provenance['arm']}, seed {provenance['seed']}"
        raise ValueError(f"{path}: this is the cell of {whose}, not of arm {arm}, seed {seed}; train the cell again")
    return cost


def read_history(paths: Paths, arm: str, seed: int) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The logged steps of a cell and its validation losses (step, tokens, validation_loss); None where it is not trained."""
    path = paths.history(arm, seed)
    if not path.is_file():
        return None
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: damaged ({error}): train the cell again") from None
    validation = [line for line in lines if "validation_loss" in line]
    if not validation:
        raise ValueError(f"{path} is damaged (no validation loss in it): train the cell again")
    steps = [line for line in lines if "validation_loss" not in line]
    return pd.DataFrame(steps), pd.DataFrame(validation, columns=["step", "tokens", "validation_loss"])


# ---------------------------------------------------------------- scores of all cells
class Scores:
    """Every arm's scores in each metric and task; the untrained student's too, as an arm of one seed."""

    def __init__(self, dag: Dag, paths: Paths):
        self.seeds = dag.config.seeds
        self.arms = list(dag.arms)
        items = {arm: read_items(paths, arm, self.seeds) for arm in self.arms}
        # the weights that the scores are of, one digest a seed
        self.models = {arm: " ".join(data.model.unique()).strip() for arm, data in items.items()}
        present = [d for d in items.values() if len(d)]
        if not present:
            raise FileNotFoundError(f"no evaluated cell under {paths.root}")
        ids = present[0].drop_duplicates("id").set_index("id").task
        for arm, data in items.items():
            _check_items(arm, data, ids)
        self.judges = _judges(pd.concat([data[["task", "judge"]] for data in present]))
        self.tasks = sorted(ids.unique())
        # answers of a task are scored in all cells or in none
        unscored = {task for task in self.tasks if not any(d.correct[d.task == task].notna().any() for d in present)}
        self.measured = {
            name: [t for t in self.tasks if name != "accuracy" or t not in unscored]
            for name, metric in ITEM_METRICS.items()
            if all(metric.column in ("", *d) for d in present)
        }
        self.matrices: dict[tuple[str, str, str], NDArray[np.float64]] = {}
        for arm, data in items.items():
            for task in self.tasks:
                order = ids[ids == task].index
                rows = [data[(data.seed == seed) & (data.task == task)] if len(data) else data for seed in self.seeds]
                for name in self.measured:
                    matrix = [_values(name, row).reindex(order) for row in rows]
                    self.matrices[arm, name, task] = np.array(matrix, dtype=np.float64)
        self._numbers(dag, paths)

    def _numbers(self, dag: Dag, paths: Paths) -> None:
        """Metrics that are one number of a cell."""

        def curve(arm: str, seed: int) -> pd.DataFrame | None:
            history = read_history(paths, arm, seed)
            return history[1] if history is not None and len(history[1]) else None

        curves = {cell: curve(*cell) for cell in dag.cells}
        costs = {cell: read_cost(paths, *cell) for cell in dag.cells}
        for name, metric in METRICS.items():
            if metric.per == "item":
                continue
            for arm in self.arms:
                found = []
                for seed in self.seeds:
                    both = curves[arm, seed], curves[dag.config.control, seed]
                    there = metric.per == "cost" or all(one is not None for one in both)
                    arguments = (costs[arm, seed],) if metric.per == "cost" else both
                    found.append(metric.measure(*arguments) if there else np.nan)
                self.matrices[arm, name, ALL] = np.array(found, dtype=np.float64)[:, None]

    def add_untrained(self, items: pd.DataFrame) -> None:
        """Scores of the student before training."""
        self.models[UNTRAINED] = ""
        for task in self.tasks:
            for name in (n for n in self.measured if ITEM_METRICS[n].column in ("", *items)):
                self.matrices[UNTRAINED, name, task] = _values(name, items[items.task == task]).to_numpy()[None]

    def measures(self, measured: bool) -> list[tuple[str, str]]:
        """(metric, task) of all metrics that are measured time and memory, or of all others."""
        found = [(name, t) for name, tasks in self.measured.items() if tasks and not measured for t in (*tasks, ALL)]
        return found + [(n, ALL) for n, m in METRICS.items() if m.per != "item" and (m.per == "cost") == measured]

    def parts(self, arm: str, metric: str, task: str) -> Parts:
        """The task's matrix, or all tasks' whose means are averaged."""
        if (arm, metric, task) in self.matrices:
            return [self.matrices[arm, metric, task]]
        return [self.matrices[arm, metric, one] for one in self.measured[metric]]


def stratified(parts: Parts) -> NDArray[np.float64]:
    """One matrix ``(seed, item)`` whose rows' means are the means of the parts': tasks side by side, each counts alike.

    Tasks are strata: that one is harder than another is no spread of the items.
    """
    total = sum(p.shape[1] for p in parts)
    middles = [float(np.nanmean(p)) if np.isfinite(p).any() else np.nan for p in parts]
    sides = [(p - m) * (total / (len(parts) * p.shape[1])) for p, m in zip(parts, middles, strict=True)]
    return np.concatenate(sides, axis=1) + float(np.mean(middles))


def _values(name: str, items: pd.DataFrame) -> pd.Series:
    """A metric of one cell's items of one task, by id; without items, none."""
    if not len(items):
        return pd.Series(dtype=float)
    return pd.Series(METRICS[name].measure(items).to_numpy(float), index=items.id)


def _check_items(arm: str, data: pd.DataFrame, ids: pd.Series) -> None:
    """Every cell has each item once, under its task: else scores could not be paired."""
    expected = set(ids.items())
    for seed, cell in data.groupby("seed"):
        found = set(zip(cell.id, cell.task, strict=True))
        if found != expected or len(cell) != len(expected):
            odd = sorted(name for name, _ in found ^ expected) or sorted(cell.id[cell.id.duplicated()])
            raise ValueError(
                f"{arm}, seed {seed}: its items differ from those of the other cells in {len(odd)} places, e.g. "
                f"{', '.join(odd[:3])}; evaluate all cells on one test split"
            )


def _judges(items: pd.DataFrame) -> dict[str, str]:
    """Task → who judged its answers: one for all cells, else accuracies could not be compared."""
    found = {task: sorted(set(judges) - {""}) for task, judges in items.groupby("task").judge}
    for task, judges in found.items():
        if len(judges) > 1:
            raise ValueError(
                f"answers of {task} were judged by {' and by '.join(judges)}: evaluate all cells again by one"
            )
    return {task: judges[0] for task, judges in found.items() if judges}

"""Per-item scores → tables: the arm over its seeds, intervals per arm, paired contrasts with corrections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kvpipe.config import Config, StatsConfig
from kvpipe.experiment.paths import ARMS, CONTRASTS, COST, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.stats.bootstrap import (
    adjust,
    adjusted_interval,
    crossed_bootstrap,
    effect_size,
    minimum_detectable_effect,
)

ALL = "all"
UNTRAINED = "untrained"
ACCURACY = "accuracy"
CELL = "cell"
"""Attribute of a table of items: the arm and seed whose scores they are, None for a model that is no cell."""
ITEM_METRICS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    # the mean over items of these is the ratio of sums over a task: nats per byte of text, not the mean of ratios
    "bits_per_byte": lambda d: d.nll / np.log(2) / d.bytes.mean(),
    "log_perplexity": lambda d: d.nll / d.tokens.mean(),
    ACCURACY: lambda d: d.correct.astype(float),
    "bits_per_byte_all_text": lambda d: d.nll_all / np.log(2) / d.bytes_all.mean(),
    "log_perplexity_all_text": lambda d: d.nll_all / d.tokens_all.mean(),
}
UNTESTED = {"tokens_to_control"}
"""Metrics that are described and not tested: a seed that never gets there has no number, so that the failures would leave
the comparison."""
CURVE_METRICS = ("tokens_to_control", "validation_area")
COST_METRICS = ("train_seconds", "peak_memory_bytes")


# ---------------------------------------------------------------- reading
def read_items(paths: Paths, arm: str, seeds: list[int]) -> pd.DataFrame:
    """All items of an arm with columns `seed` and `model`, the digest of the weights; only cells that exist.

    Raises:
        ValueError: a number is not finite, or the scores are of another cell, or of other weights than it has now.
    """
    frames = []
    for seed in seeds:
        path, cell = paths.items(arm, seed), paths.cell(arm, seed)
        if path.is_file():
            items = _complete(_own(pd.read_parquet(path), path, arm, seed), path)
            scored, trained = (
                items.attrs.get("model", ""),
                read_cost(paths, arm, seed).get("model", {}).get("digest", ""),
            )
            if scored and trained and scored != trained:
                raise ValueError(
                    f"{path} has the scores of a model {scored}, {cell} is {trained}: evaluate the cell again"
                )
            frames.append(items.assign(seed=seed, model=scored))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"seed": [], "model": []})


def cell_of(model: Path) -> dict[str, Any] | None:
    """Arm and seed of the cell that a model folder belongs to; None for every other model."""
    path = model.parent / COST
    if not path.is_file():
        return None
    provenance = json.loads(path.read_text(encoding="utf-8")).get("provenance", {})
    return {key: provenance.get(key) for key in ("arm", "seed")}


def _own(items: pd.DataFrame, path: Path, arm: str, seed: int) -> pd.DataFrame:
    """Items of another cell would pass for this one's. Tables of earlier versions do not say whose they are."""
    if CELL in items.attrs and (cell := items.attrs.pop(CELL)) != {"arm": arm, "seed": seed}:
        whose = f"arm {cell['arm']}, seed {cell['seed']}" if cell else "a model that is no cell"
        raise ValueError(
            f"{path}: these are the scores of {whose}, not of arm {arm}, seed {seed}; score the cell again"
        )
    return items


def read_cost(paths: Paths, arm: str, seed: int) -> dict[str, Any]:
    """What a cell cost; empty where it is not trained.

    Raises:
        ValueError: the file is no JSON object, or is another cell's.
    """
    path = paths.cost(arm, seed)
    if not path.is_file():
        return {}
    try:
        cost = json.loads(path.read_text(encoding="utf-8"))
        provenance = cost.get("provenance", {})
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not the JSON object that training writes ({error}); train the cell again") from None
    if provenance.get("arm", arm) != arm or provenance.get("seed", seed) != seed:
        whose = f"arm {provenance['arm']}, seed {provenance['seed']}"
        raise ValueError(f"{path}: this is the cell of {whose}, not of arm {arm}, seed {seed}; train the cell again")
    return cost


def _complete(items: pd.DataFrame, path: Path) -> pd.DataFrame:
    """A number that is missing would pass for a missing cell."""
    for column in items.select_dtypes("number"):
        bad = items.id[~np.isfinite(items[column])]
        if len(bad):
            raise ValueError(f"{path}: {column} of item {bad.iloc[0]} is not finite ({len(bad)} items); score it again")
    return items


def read_curve(paths: Paths, arm: str, seed: int) -> pd.DataFrame:
    """Validation losses of a cell: step, tokens, validation_loss."""
    path = paths.history(arm, seed)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pd.DataFrame([line for line in lines if "validation_loss" in line])[["step", "tokens", "validation_loss"]]


def tokens_to(curve: pd.DataFrame, target: float) -> float:
    """Training tokens at which a validation curve first reaches a loss, between evaluations by linear interpolation.

    NaN when it never does.
    """
    loss, tokens = curve.validation_loss.to_numpy(), curve.tokens.to_numpy(float)
    below = np.flatnonzero(loss <= target)
    if not below.size:
        return float("nan")
    i = int(below[0])
    if i == 0:
        return float(tokens[0])
    share = (loss[i - 1] - target) / (loss[i - 1] - loss[i])
    return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def area_under(curve: pd.DataFrame) -> float:
    """Mean validation loss over the training tokens (trapezoids): lower is faster."""
    tokens = curve.tokens.to_numpy(float)
    return float(np.trapezoid(curve.validation_loss, tokens) / (tokens[-1] - tokens[0]))


# ---------------------------------------------------------------- one arm
def write_arm_table(dag: Dag, paths: Paths, arm: str) -> None:
    """Write `arm_table` where it belongs."""
    dag.arm(arm)
    out = paths.arm_table(arm)
    out.parent.mkdir(parents=True, exist_ok=True)
    arm_table(dag, paths, arm).to_csv(out, index=False)


def arm_table(dag: Dag, paths: Paths, arm: str) -> pd.DataFrame:
    """One row per seed and task (and the macro average): the item metrics' means, and the cell's curve and size."""
    rows = []
    for seed in dag.config.seeds:
        items = read_items(paths, arm, [seed])
        if not len(items):
            raise FileNotFoundError(f"{paths.items(arm, seed)} is missing: evaluate the cell first")
        cost = read_cost(paths, arm, seed)
        curve = read_curve(paths, arm, seed)
        per_task = {task: {m: f(d).mean() for m, f in ITEM_METRICS.items()} for task, d in items.groupby("task")}
        macro = {m: _macro([values[m] for values in per_task.values()]) for m in ITEM_METRICS}
        for task, values in [*sorted(per_task.items()), (ALL, macro)]:
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "model": items.model.iloc[0],
                    "task": task,
                    "n_items": int((items.task == task).sum()) if task != ALL else len(items),
                    **values,
                    "final_validation_loss": curve.validation_loss.iloc[-1],
                    "validation_area": area_under(curve),
                    "steps": cost["steps"],
                    "tokens": cost["tokens"],
                }
            )
    return pd.DataFrame(rows)


def _macro(means: list[float]) -> float:
    """The mean over the tasks that have the metric: plain text, for one, has no accuracy."""
    found = [mean for mean in means if not np.isnan(mean)]
    return float(np.mean(found)) if found else float("nan")


# ---------------------------------------------------------------- score matrices
class Scores:
    """Per metric and task, every arm's matrix (seed, item); NaN where a cell is missing."""

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
        self.tasks = sorted(ids.unique())
        # answers of a task are scored in all cells or in none
        scored = {task: any(d.correct[d.task == task].notna().any() for d in present) for task in self.tasks}
        self.measured = {m: [t for t in self.tasks if m != ACCURACY or scored[t]] for m in ITEM_METRICS}
        self.matrices: dict[tuple[str, str, str], np.ndarray] = {}
        for arm, data in items.items():
            for task in self.tasks:
                order = ids[ids == task].index
                for metric, function in ITEM_METRICS.items():
                    self.matrices[arm, metric, task] = self._matrix(data, task, order, function)
        self._curves(dag, paths)

    def _matrix(self, data: pd.DataFrame, task: str, order: pd.Index, function) -> np.ndarray:
        rows = []
        for seed in self.seeds:
            one = data[(data.seed == seed) & (data.task == task)] if len(data) else data
            if not len(one):
                rows.append(np.full(len(order), np.nan))
                continue
            values = pd.Series(function(one).to_numpy(float), index=one.id)
            rows.append(values[order].to_numpy())
        return np.array(rows)

    def _curves(self, dag: Dag, paths: Paths) -> None:
        def curve(arm: str, seed: int) -> pd.DataFrame | None:
            found = paths.history(arm, seed).is_file()
            return read_curve(paths, arm, seed) if found else None

        control = {seed: curve(dag.config.control, seed) for seed in self.seeds}
        for arm in self.arms:
            reach, area = [], []
            for seed in self.seeds:
                own, reference = curve(arm, seed), control[seed]
                if own is None or reference is None:
                    reach.append(np.nan)
                else:
                    reach.append(tokens_to(own, reference.validation_loss.iloc[-1]))
                area.append(np.nan if own is None else area_under(own))
            self.matrices[arm, "tokens_to_control", ALL] = np.array(reach)[:, None]
            self.matrices[arm, "validation_area", ALL] = np.array(area)[:, None]

    def parts(self, arm: str, metric: str, task: str) -> list[np.ndarray]:
        """Matrices whose means are averaged: the task's, or all tasks' for the macro average."""
        if (arm, metric, task) in self.matrices:
            return [self.matrices[arm, metric, task]]
        return [self.matrices[arm, metric, one] for one in self.measured[metric]]

    def matrix(self, arm: str, metric: str, task: str) -> np.ndarray:
        """One matrix whose mean is the metric: tasks side by side, weighted so that each counts alike."""
        parts = self.parts(arm, metric, task)
        total = sum(p.shape[1] for p in parts)
        return np.concatenate([p * (total / (len(parts) * p.shape[1])) for p in parts], axis=1)


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


def _measures(scores: Scores) -> list[tuple[str, str]]:
    measured = [(m, t) for m, tasks in scores.measured.items() if tasks for t in (*tasks, ALL)]
    return measured + [(m, ALL) for m in CURVE_METRICS]


# ---------------------------------------------------------------- statistics
def arms_table(scores: Scores, config: StatsConfig, untrained: pd.DataFrame | None) -> pd.DataFrame:
    """`arms.csv`: mean and interval of every arm, metric and task over seeds × items."""
    rows = []
    for arm in scores.arms:
        for metric, task in _measures(scores):
            row = _arm_row(arm, metric, task, scores.matrix(arm, metric, task), config)
            rows.append(row | {"models": scores.models[arm]})
    if untrained is not None:
        for metric, function in ITEM_METRICS.items():
            measured = untrained[untrained.task.isin(scores.measured[metric])]
            per_task = {t: function(d).to_numpy(float)[None] for t, d in measured.groupby("task")}
            if not per_task:
                continue
            for task, matrix in per_task.items():
                rows.append(_arm_row(UNTRAINED, metric, task, matrix, config))
            total = sum(m.shape[1] for m in per_task.values())
            joined = [m * (total / (len(per_task) * m.shape[1])) for m in per_task.values()]
            rows.append(_arm_row(UNTRAINED, metric, ALL, np.concatenate(joined, axis=1), config))
    return pd.DataFrame(rows)


def _arm_row(arm: str, metric: str, task: str, matrix: np.ndarray, config: StatsConfig) -> dict:
    kept = matrix[~np.isnan(matrix).any(1)]
    row = {"arm": arm, "metric": metric, "task": task, "mean": np.nan, "low": np.nan, "high": np.nan}
    if len(kept):
        row["mean"] = kept.mean()
        if kept.size > 1:  # a single number has no interval
            interval = crossed_bootstrap(kept, config.resamples, config.confidence, config.seed)
            # nothing here is below 0 and no share above 1, whatever a symmetric interval says
            row["low"], row["high"] = np.clip([interval.low, interval.high], 0, _largest(metric))
    return row | {
        "n_seeds": len(kept),
        "n_items": matrix.shape[1],
        "missing_seeds": len(matrix) - len(kept),
    }


def _largest(metric: str) -> float:
    """The largest value that a metric can have, and so the largest difference."""
    return 1.0 if metric == ACCURACY else np.inf


def families(config: Config) -> dict[str, list[tuple[str, str]]]:
    """Question → its contrasts (arm, reference), in the order of the configuration; corrections go over a question's.

    Every experiment, null and baseline is compared with control; every experiment that is built on another one, and every
    ablation, with its base; the headline with every baseline; and what `stats.contrasts` adds. A family is all contrasts
    of one role with one reference, and those of the headline with the baselines: one alone is not corrected for any other.
    """
    roles = {name: config.arm(name).role for name in config.arms}
    control, headline = config.control, config.headline
    pairs = [(arm, control) for arm, role in roles.items() if role in ("experiment", "null", "baseline")]
    for arm, role in roles.items():
        base = config.arms[arm].base
        if base and (role == "ablation" or role == roles[base] == "experiment"):
            pairs.append((arm, base))
    pairs += [(headline, arm) for arm, role in roles.items() if headline and role == "baseline" and arm != headline]
    pairs += [(arm, reference) for arm, reference in config.stats.contrasts]
    found: dict[str, list[tuple[str, str]]] = {}
    for arm, reference in dict.fromkeys(pairs):
        if arm == headline and roles[reference] == "baseline":
            question = f"{arm} against baselines"
        elif reference == control or roles[arm] not in ("experiment", "ablation"):
            question = f"{roles[arm]}s against {reference}"
        else:
            question = f"ablations of {reference}" if roles[arm] == "ablation" else f"against {reference}"
        found.setdefault(question, []).append((arm, reference))
    return found


def contrasts_table(
    families: dict[str, list[tuple[str, str]]],
    measures: list[tuple[str, str]],
    matrix: Callable[[str, str, str], np.ndarray],
    config: StatsConfig,
) -> pd.DataFrame:
    """`contrasts.csv`: paired differences with corrections over their family, of one metric and task.

    A family holds the contrasts that are tested: those of two seeds or more that have all the seeds that were planned, of
    a metric that is no `UNTESTED` one. Of every other the estimate is given, and no p, interval or family.
    """
    rows = []
    for metric, task in measures:
        for name, pairs in families.items():
            members = []
            for arm, reference in pairs:
                difference = matrix(arm, metric, task) - matrix(reference, metric, task)
                members.append((arm, reference, difference[~np.isnan(difference).any(1)], len(difference)))
            size = sum(_tested(metric, kept, seeds) for _, _, kept, seeds in members)
            block = [_contrast_row(*member, metric, task, name, size, config) for member in members]
            p = [row["p"] for row in block]
            for row, bonferroni, holm in zip(block, adjust(p, "bonferroni"), adjust(p, "holm"), strict=True):
                rows.append(row | {"p_bonferroni": bonferroni, "p_holm": holm})
    return pd.DataFrame(rows, columns=COLUMNS)


COLUMNS = [
    "arm", "reference", "metric", "task", "estimate", "low", "high", "p", "p_bonferroni", "p_holm", "effect_size",
    "n_seeds", "n_items", "low_corrected", "high_corrected", "mde", "family", "family_size", "missing_seeds",
]  # fmt: skip


def _tested(metric: str, kept: np.ndarray, seeds: int) -> bool:
    """One seed says nothing of other seeds, and seeds that are lost may be lost for what they would have shown."""
    return metric not in UNTESTED and len(kept) == seeds > 1


def _contrast_row(
    arm: str, reference: str, kept: np.ndarray, seeds: int, metric: str, task: str, name: str, size: int, config
) -> dict:
    row = {"arm": arm, "reference": reference, "metric": metric, "task": task, "family": None, "family_size": 0}
    numbers = dict.fromkeys(
        ("estimate", "low", "high", "p", "low_corrected", "high_corrected", "effect_size", "mde"), np.nan
    )
    if len(kept) and (metric not in UNTESTED or len(kept) == seeds):
        numbers["estimate"] = kept.mean()
    if _tested(metric, kept, seeds):
        most = _largest(metric)
        row |= {"family": name, "family_size": size}
        plain = crossed_bootstrap(kept, config.resamples, config.confidence, config.seed)
        corrected = adjusted_interval(kept, size, config.resamples, config.confidence, config.seed)
        mde = minimum_detectable_effect(kept, (1 - config.confidence) / size, config.power)
        bounds = {"low": plain.low, "high": plain.high}
        bounds |= {"low_corrected": corrected.low, "high_corrected": corrected.high}
        numbers = {
            "estimate": plain.estimate,
            "p": plain.p,
            **{key: float(np.clip(bound, -most, most)) for key, bound in bounds.items()},
            "effect_size": effect_size(kept),
            "mde": mde if mde <= most else np.nan,  # no difference would be large enough
        }
    n_items = kept.shape[1]
    return row | numbers | {"n_seeds": len(kept), "n_items": n_items, "missing_seeds": seeds - len(kept)}


# ---------------------------------------------------------------- the step
def write_stats(dag: Dag, paths: Paths, untrained: Path | None) -> None:
    """`stats/` (the same in every run) and `cost/` (measured time and memory)."""
    config = dag.config.stats
    asked = families(dag.config)
    scores = Scores(dag, paths)
    base = pd.read_parquet(untrained) if untrained is not None else None
    paths.stats.mkdir(parents=True, exist_ok=True)
    arms_table(scores, config, base).to_csv(paths.stats / ARMS, index=False)
    contrasts_table(asked, _measures(scores), scores.matrix, config).to_csv(paths.stats / CONTRASTS, index=False)

    costs = _costs(dag, paths)
    measures = [(metric, ALL) for metric in COST_METRICS]
    paths.costs.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(
        [
            _arm_row(arm, metric, task, costs[arm, metric, task], config)
            for arm in scores.arms
            for metric, task in measures
        ]
    ).to_csv(paths.costs / ARMS, index=False)
    contrasts_table(asked, measures, lambda *key: costs[key], config).to_csv(paths.costs / CONTRASTS, index=False)


def _costs(dag: Dag, paths: Paths) -> dict[tuple[str, str, str], np.ndarray]:
    out = {}
    for arm in dag.arms:
        found = []
        for seed in dag.config.seeds:
            found.append(read_cost(paths, arm, seed))
        for metric in COST_METRICS:
            out[arm, metric, ALL] = np.array([[cost.get(metric, np.nan)] for cost in found], dtype=float)
    return out

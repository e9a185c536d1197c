"""Finished artefacts as the report reads them; what is absent is named, never passed over."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from kvpipe.align.layermap import LayerPlan, at_kept_depth, layer_plan
from kvpipe.config import Arm, Config
from kvpipe.data.records import Record, read_records
from kvpipe.experiment.files import read_json, read_table
from kvpipe.experiment.paths import ARMS, CONTRASTS, PAIRS, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.sizes import shape
from kvpipe.experiment.steps import TeacherKV
from kvpipe.models.folders import load_tokenizer, recorded
from kvpipe.stats.metrics import METRICS, PRIMARY
from kvpipe.stats.scores import ALL, UNTRAINED, read_history
from kvpipe.stats.tables import CONTRAST_COLUMNS

ROLES = ("control", "experiment", "ablation", "baseline", "null")
LOSSLESS = 1e-4
"""What a fit loses less than in every layer is nothing to draw."""
THIRDS = ("easiest", "middle", "hardest")
ON_DEVICE = ("layer_map", "teacher_kv", "fit", "evaluate", "untrained", "teacher_quality", "lm_eval")
"""Steps that run where training does."""
ARM_COLUMNS = ["arm", "metric", "task", "mean", "low", "high", "n_seeds", "n_items"]


@dataclass(frozen=True)
class Estimate:
    """A mean over `n_seeds` seeds with its interval; NaN where it could not be computed."""

    mean: float
    low: float
    high: float
    n_seeds: int

    @property
    def known(self) -> bool:
        """Whether there is a number."""
        return isfinite(self.mean)


class Contrast(SimpleNamespace):
    """Arm minus reference: a row of `contrasts.csv`.

    Its verdict is `better`, `worse` or `undecided` by the primary method, corrected for its family; `constant` where seeds
    do not vary, `untested` where some are lost or one is all, `missing` without an estimate.
    """

    @property
    def known(self) -> bool:
        """Whether there is an estimate."""
        return isfinite(self.estimate)

    @property
    def tested(self) -> bool:
        """Whether it has an interval and a p-value."""
        return self.verdict in ("better", "worse", "undecided")


@dataclass(frozen=True)
class History:
    """The two kinds of line of a cell's history."""

    steps: pd.DataFrame
    validation: pd.DataFrame


class Results:
    """The artefacts of one results folder, each read when first asked for.

    The statistics are required; of everything else an absent file gives None (or leaves a cell out), and `absent` says so.
    """

    def __init__(self, config: Config, paths: Paths):
        self.config, self.paths, self.dag = config, paths, Dag(config)
        self.control, self.headline = config.control, config.headline

    def records(self, split: str) -> list[Record]:
        """Records of a split; none where it is not there."""
        return read_records(self.paths.data(split)) if self.paths.data(split).is_file() else []

    def tokenizer(self, model: str) -> Any:
        """A model's tokenizer."""
        return load_tokenizer(self.paths.model(model), self.config.trusts(model))

    # ------------------------------------------------------------ tables
    @cached_property
    def arms(self) -> dict[tuple[str, str, str], Estimate]:
        """(arm, metric, task) → estimate."""
        table = self._tables(ARMS, ARM_COLUMNS)
        return {(r.arm, r.metric, r.task): Estimate(r.mean, r.low, r.high, int(r.n_seeds)) for r in table.itertuples()}

    @cached_property
    def contrasts(self) -> dict[tuple[str, str, str, str], Contrast]:
        """(arm, reference, metric, task) → contrast, in the order of the tables."""
        table = self._tables(CONTRASTS, CONTRAST_COLUMNS)
        found = (Contrast(**row) for row in table.to_dict("records"))
        return {(c.arm, c.reference, c.metric, c.task): c for c in found}

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """Pairs of models; without a row where the table is not there."""
        path = self.paths.stats / PAIRS
        return read_table(path, "run `kvpipe stats`") if path.is_file() else pd.DataFrame()

    def _tables(self, name: str, columns: list[str]) -> pd.DataFrame:
        paths = [self.paths.stats / name, self.paths.costs / name]
        if not paths[0].is_file():
            raise FileNotFoundError(f"{paths[0]} is missing: run `kvpipe stats` first")
        frames = []
        for path in (p for p in paths if p.is_file()):
            frames.append(read_table(path, "run `kvpipe stats`", columns)[columns])
        return pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)

    @cached_property
    def tasks(self) -> list[str]:
        """Tasks in the order of the configuration."""
        return [source.task for source in self.config.data.sources]

    @cached_property
    def arm_order(self) -> list[str]:
        """Arms grouped by role, in the order of the configuration within a role."""
        return sorted(self.dag.arms, key=lambda name: ROLES.index(self.dag.arms[name].role))

    def role(self, arm: str) -> str:
        """Role of an arm; the untrained student counts with control."""
        return "control" if arm == UNTRAINED else self.dag.arms[arm].role

    # ------------------------------------------------------------ cells
    @cached_property
    def histories(self) -> dict[str, dict[int, History]]:
        """arm → seed → history of the cells that have one."""
        out: dict[str, dict[int, History]] = {}
        for arm, seed in self.dag.cells:
            history = read_history(self.paths, arm, seed)
            if history is not None:
                out.setdefault(arm, {})[seed] = History(*history)
        return out

    @cached_property
    def costs(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What every trained cell cost."""
        found = {cell: read_document(self.paths.cost(*cell)) for cell in self.dag.cells}
        return {cell: cost for cell, cost in found.items() if cost is not None}

    def items(self, arm: str, seed: int) -> pd.DataFrame | None:
        """Per-item scores of a cell."""
        return read_parquet(self.paths.items(arm, seed))

    def curve(self, arm: str) -> pd.DataFrame:
        """Mean, lowest and highest validation loss over the seeds at each step that all of them have, beside the mean of
        their training tokens and of their seconds so far; without a row where the arm has no history."""
        frames = []
        for seed, history in self.histories.get(arm, {}).items():
            cost = self.costs.get((arm, seed), {})
            # a step takes as long as every other
            rate = cost.get("train_seconds", np.nan) / cost.get("steps", np.nan)
            frames.append(history.validation.assign(seconds=history.validation.step * rate))
        if not frames:
            return pd.DataFrame()
        grouped = pd.concat(frames).groupby("step")
        found = grouped[["tokens", "seconds"]].mean()
        found[["mean", "low", "high"]] = grouped.validation_loss.agg(["mean", "min", "max"])
        return found[grouped.size() == len(frames)]

    def layer_losses(self, arm: str, kind: str) -> pd.DataFrame | None:
        """Loss of keys or values, a row for each student layer and a column for each logged step; the mean over seeds."""
        prefix, frames = f"layer/{kind}/", []
        for history in self.histories.get(arm, {}).values():
            columns = [c for c in history.steps.columns if c.startswith(prefix)]
            frames += [history.steps.set_index("step")[columns]] if columns else []
        if not frames:
            return None
        return (
            pd.concat(frames)
            .groupby("step")
            .mean()
            .rename(columns=lambda c: int(c.removeprefix(prefix)))
            .T.sort_index()
        )

    @cached_property
    def compared(self) -> list[str]:
        """Control, the headline and the baselines: what is shown where all arms are too many."""
        return list(
            dict.fromkeys([self.control, *([self.headline] if self.headline else []), *self.of_role("baseline")])
        )

    @cached_property
    def shown_first(self) -> list[str]:
        """All arms, the headline before the others."""
        return sorted(self.arm_order, key=lambda arm: arm != self.headline)

    def of_role(self, role: str) -> list[str]:
        """The arms of a role."""
        return [arm for arm in self.arm_order if self.role(arm) == role]

    @cached_property
    def by_difficulty(self) -> pd.DataFrame:
        """The primary metric by (task, third of its test items) and (arm, seed). Difficulty is the loss per byte of the
        student before training, which no arm has a part in; empty where that was not scored."""
        before = read_parquet(self.paths.untrained)
        if before is None:
            return pd.DataFrame()
        rank = (before.nll / before.bytes).groupby(before.task).rank(method="first", pct=True)
        third = dict(zip(before.id, np.ceil(rank * len(THIRDS)).astype(int) - 1, strict=True))
        columns = {}
        for arm in self.arm_order:
            for seed in self.config.seeds:
                if (items := self.items(arm, seed)) is not None:
                    parts = items.groupby(["task", items.id.map(third)])
                    columns[arm, seed] = {key: PRIMARY.measure(part).mean() for key, part in parts}
        found = pd.DataFrame(columns)
        found.columns.names = ["arm", "seed"] if columns else [None]
        found.index = pd.MultiIndex.from_tuples([(t, THIRDS[int(i)]) for t, i in found.index], names=["task", "third"])
        return found.reindex([(task, name) for task in self.tasks for name in THIRDS]).dropna(how="all")

    @cached_property
    def fusion_weights(self) -> pd.DataFrame:
        """Arm, task, then one column per teacher: its share of the fused target at the end of training.

        Mean over the last quarter of the logged steps and over seeds; positions without a target have no weight, so rows
        are scaled to sum to 1.
        """
        rows = []
        for arm in (name for name in self.arm_order if len(self.dag.arms[name].teachers) > 1):
            frames = [
                h.steps.iloc[len(h.steps) * 3 // 4 :] for h in self.histories.get(arm, {}).values() if len(h.steps)
            ]
            for task in self.tasks:
                found = pd.DataFrame(
                    [
                        {t: f[c].mean() for t in self.dag.arms[arm].teachers if (c := f"weight/{task}/{t}") in f}
                        for f in frames
                    ]
                ).mean()
                if len(found) == len(self.dag.arms[arm].teachers) and found.sum() > 0:
                    rows.append({"arm": arm, "task": task, **(found / found.sum())})
        return pd.DataFrame(rows)

    @cached_property
    def routers(self) -> dict[str, dict[str, Any]]:
        """Arm → weights (example, layer, teacher) at the end of training of the first seed, where examples of one task
        differ in them."""
        tasks, out = [record.task for record in self.records("train")], {}
        for arm in self.arm_order:
            found = self.costs.get((arm, self.config.seeds[0]), {}).get("router")
            if found and tasks:
                router = {**found, "tasks": [tasks[example] for example in found["examples"]]}
                grouped = pd.DataFrame(np.array(router["weights"]).reshape(len(router["tasks"]), -1))
                if grouped.groupby(router["tasks"]).std().max().max() > 1e-3:
                    out[arm] = router
        return out

    @cached_property
    def judges(self) -> dict[str, list[str]]:
        """Task → who judged its answers, as the scores of the cells say."""
        tables = (frame for cell in self.dag.cells if (frame := self.items(*cell)) is not None)
        said = {(task, judge) for table in tables for task, judge in table.attrs.get("judges", {}).items()}
        return {task: sorted(judge for name, judge in said if name == task) for task in self.tasks}

    @cached_property
    def missing_cells(self) -> list[tuple[str, int]]:
        """Cells without a trained model or without scores."""
        return [c for c in self.dag.cells if c not in self.costs or not self.paths.items(*c).is_file()]

    def missing_seeds(self, arm: str) -> list[int]:
        """Seeds of an arm that have no finished cell."""
        return [seed for name, seed in self.missing_cells if name == arm]

    @cached_property
    def spending(self) -> pd.DataFrame:
        """Jobs, hours, GPU hours and peak memory (GB) of each step, as the cells and Snakemake's benchmarks say.

        Of the memory of other steps than training the benchmarks say nothing: steps may share a process.
        """
        device = any(cost.get("provenance", {}).get("device", "cpu") != "cpu" for cost in self.costs.values())
        cells = [(c.get("wall_seconds", c["train_seconds"]), c.get("gpu_seconds", 0), c["peak_memory_bytes"] / 1e9)
                 for c in self.costs.values()]  # fmt: skip
        found = {"train": cells} if cells else {}
        folder = self.paths.benchmark("x").parent
        for path in sorted(folder.rglob("*.tsv")):
            step = path.relative_to(folder).parts[0].removesuffix(".tsv")
            if step not in ("train", "report"):  # cells say it of all attempts; the page is not there yet
                seconds = float(pd.read_csv(path, sep="\t").s.iloc[-1])
                found.setdefault(step, []).append((seconds, seconds * (device and step in ON_DEVICE), np.nan))
        rows = [
            (step, len(jobs), *np.sum(jobs, axis=0)[:2] / 3600, np.array(jobs)[:, 2].max())
            for step, jobs in found.items()
        ]
        return pd.DataFrame(rows, columns=["step", "jobs", "hours", "gpu_hours", "memory"])

    # ------------------------------------------------------------ teachers
    def plans(self, teacher: str) -> list[tuple[Arm, LayerPlan]]:
        """What the arms take of a teacher's layers; without an entry where the two depths are not known."""
        configs = [read_document(self.paths.model(name) / "config.json") for name in (teacher, self.config.student)]
        src, dst = (found.layers if config and (found := shape(config)) else None for config in configs)
        arms = [arm for arm in self.dag.arms.values() if teacher in arm.teachers and "targets" in arm.needs]
        arms = [arm for arm in arms if teacher in self.layer_maps or not self.dag.needs_layer_map(arm)]
        kept = self.manifests.get(self.config.student, {}).get("source", {})
        if src is None or dst is None:
            return []
        return [
            (arm, layer_plan(at_kept_depth(arm.layer, src, kept), src, dst, self.paths.layer_map(teacher)))
            for arm in arms
        ]

    def fit_users(self, fit: str) -> list[str]:
        """The arms that use a fit."""
        arms = self.dag.arms.items()
        return [name for name, arm in arms if self.dag.needs_fit(arm) and self.dag.fit_id(arm) == fit]

    @cached_property
    def fit_curves(self) -> dict[str, dict[tuple[str, str], np.ndarray]]:
        """Fit → (teacher, kind) → what is lost in each student layer, of fits that have numbers: of keys and of values the
        share of variance that cannot be recovered, of the attention output 1 − cosine."""
        out: dict[str, dict[tuple[str, str], np.ndarray]] = {}
        for name, document in self.fits.items():
            found = {(t, kind): v for t, kinds in document["explained_variance"].items() for kind, v in kinds.items()}
            found |= {(t, "attention output"): v for t, v in document.get("attention_output_cosine", {}).items()}
            arrays = {key: 1 - np.array(values, dtype=float) for key, values in found.items()}
            finite = {key: values for key, values in arrays.items() if np.isfinite(values).any()}
            out |= {name: finite} if finite else {}
        return out

    @cached_property
    def lossless_fits(self) -> list[str]:
        """Fits that keep all there is in every layer: a picture of them would be flat."""
        return [name for name, found in self.fit_curves.items() if max(map(np.nanmax, found.values())) < LOSSLESS]

    # ------------------------------------------------------------ artefacts of teachers
    @cached_property
    def layer_maps(self) -> dict[str, dict[str, Any]]:
        """Similarity of layers, of the teachers that have one."""
        return self._documents({t: self.paths.layer_map(t) for t in self.dag.teachers})

    @cached_property
    def fits(self) -> dict[str, dict[str, Any]]:
        """Explained variance of the fits that are done, in the order of the arms that use them."""
        arms = [self.dag.arms[name] for name in self.arm_order]
        names = dict.fromkeys(self.dag.fit_id(arm) for arm in arms if self.dag.needs_fit(arm))
        return self._documents({name: self.paths.fit_report(name) for name in names})

    @cached_property
    def stores(self) -> dict[tuple[str, str], dict[str, Any]]:
        """(teacher, reading) → index of the store."""
        keys = [(job["teacher"], job["reading"]) for job in TeacherKV(self.dag, self.paths).jobs()]
        return self._documents({key: self.paths.store_index(*key) for key in keys})

    @cached_property
    def text_counts(self) -> dict[str, dict[str, Any]]:
        """What teachers have written."""
        return self._documents({t: self.paths.text_counts(t) for t in self.dag.teachers})

    @cached_property
    def teacher_items(self) -> dict[str, pd.DataFrame]:
        """Per-item scores of the teachers that were evaluated."""
        found = {t: read_parquet(self.paths.teacher_quality(t)) for t in self.dag.judged_teachers}
        return {teacher: frame for teacher, frame in found.items() if frame is not None}

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any]]:
        """Manifests of the models that are there."""
        found = {name: recorded(self.paths.model(name)) for name in self.config.models}
        return {name: manifest for name, manifest in found.items() if manifest}

    # ------------------------------------------------------------ checks
    @cached_property
    def audit(self) -> dict[str, Any] | None:
        """Fairness audit."""
        return read_document(self.paths.audit)

    @cached_property
    def doctor(self) -> dict[str, Any] | None:
        """Findings about the machine."""
        return read_document(self.paths.doctor)

    @cached_property
    def absent(self) -> list[str]:
        """Sentences on what this results folder does not hold."""
        out = []
        if self.missing_cells:
            every = {arm for arm in self.dag.arms if self.missing_seeds(arm) == self.config.seeds}
            parts = [arm if arm in every else f"{arm}/seed{seed}" for arm, seed in self.missing_cells]
            names = ", ".join(dict.fromkeys(parts))
            out.append(f"{len(self.missing_cells)} of {len(self.dag.cells)} cells are not finished: {names}.")
        if not (self.paths.costs / ARMS).is_file():
            out.append("The tables of training time and memory (cost/) are absent.")
        out += self._untested()
        unmeasured = [t for t in self.dag.judged_teachers if t not in self.teacher_items]
        if unmeasured:
            out.append(f"Teacher quality was not measured for {', '.join(unmeasured)}.")
        if not self.records("validation"):
            out.append("The records are absent: no alignment is drawn and no answer shown.")
        if self.audit is None:
            out.append("The fairness audit (audit.json) is absent: nothing below has been checked for leakage.")
        if self.doctor is None:
            out.append("The doctor's findings (doctor.json) are absent.")
        return out

    def _untested(self) -> list[str]:
        """Sentences on contrasts that are no test: of one seed, of fewer seeds than planned."""
        planned = len(self.config.seeds)
        if planned == 1:
            return ["One seed: differences are those of these single runs; there is no p-value, interval or verdict."]
        # a metric that is never tested is said with the tables
        kept = [c for c in self.contrasts.values() if c.task == ALL and METRICS[c.metric].tested]
        short: dict[tuple[str, int], list[str]] = {}
        for c in (c for c in kept if c.n_seeds < planned):
            short.setdefault((f"{c.arm} − {c.reference}", c.n_seeds), []).append(METRICS[c.metric].label)
        alike: dict[tuple[int, str], list[str]] = {}
        every = len({c.metric for c in kept})
        for (pair, seeds), metrics in short.items():
            alike.setdefault((seeds, "" if len(metrics) == every else f" in {'; '.join(metrics)}"), []).append(pair)
        return [f"Not tested{of}, {n} of {planned} seeds: {', '.join(pairs)}." for (n, of), pairs in alike.items()]

    @staticmethod
    def _documents(paths: dict[Any, Path]) -> dict[Any, dict[str, Any]]:
        found = {key: read_document(path) for key, path in paths.items()}
        return {key: value for key, value in found.items() if value is not None}


def read_document(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None where there is none."""
    return read_json(path, "make it again") if path.is_file() else None


def read_parquet(path: Path) -> pd.DataFrame | None:
    """A Parquet file, or None where there is none."""
    return read_table(path, "make it again") if path.is_file() else None

"""Finished artefacts as the report reads them; what is absent is named, never passed over."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

import pandas as pd

from kvpipe.config import Config
from kvpipe.data.records import Record, read_records
from kvpipe.experiment.files import read_json, read_table
from kvpipe.experiment.paths import ARMS, CONTRASTS, PAIRS, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import TeacherKV
from kvpipe.models.folders import load_tokenizer, recorded
from kvpipe.stats.metrics import METRICS
from kvpipe.stats.scores import ALL, UNTRAINED, read_history

ROLES = ("control", "experiment", "ablation", "baseline", "null")
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


@dataclass(frozen=True)
class Contrast:
    """Arm minus reference: what the page shows of a row of `contrasts.csv`."""

    arm: str
    reference: str
    metric: str
    task: str
    estimate: float
    verdict: str
    """`better`, `worse` or `undecided` by the primary method, corrected for its family; `constant` where seeds do not
    vary, `untested` where some are lost or one is all, `missing` without an estimate."""
    p_dunnett: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_low_plain: float
    ratio_high_plain: float
    difference_low: float
    difference_high: float
    difference_low_plain: float
    difference_high_plain: float
    effect_size_seeds: float
    mde: float
    mde_ratio: float
    n_seeds: int
    n_items: int
    low_corrected: float
    high_corrected: float
    p_bonferroni: float
    p_holm: float
    """The last four: of the bootstrap that stands beside it."""

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
        table = self._tables(CONTRASTS, [field.name for field in fields(Contrast)])
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

    # ------------------------------------------------------------ teachers
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
        out: dict[str, list[str]] = {}
        # a metric that is never tested is said with the tables
        kept = (c for c in self.contrasts.values() if c.task == ALL and METRICS[c.metric].tested)
        for c in (c for c in kept if c.n_seeds < planned):
            out.setdefault(f"{c.arm} − {c.reference}, {c.n_seeds} of {planned} seeds", []).append(c.metric)
        return [f"Not tested: {pair} ({', '.join(metrics)})." for pair, metrics in out.items()]

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

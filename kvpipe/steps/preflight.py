"""What the whole grid will cost, measured on a small copy of it, and how hard each term of each arm pulls.

The copy reads training texts of all lengths, some batches of them, and runs every step that an arm needs, each in a process
of its own; what a step took is scaled by how much more the grid reads. Models, splits and tokens are the experiment's own
and are made where they are missing.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Group
from rich.table import Table

from kvpipe.config import Config
from kvpipe.config.arms import CROSS_ENTROPY
from kvpipe.data.batches import spread
from kvpipe.data.records import read_as, read_records, write_records
from kvpipe.doctor.memory import needs
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.attempts import Attempt
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.files import GB
from kvpipe.experiment.paths import SPLITS, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import table
from kvpipe.models.folders import weights_dtype
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import make, run
from kvpipe.steps.train import load_cell
from kvpipe.train.step import Pull
from kvpipe.train.trainer import Loop, Rehearsal, peak_memory

VALIDATION, TEST, PROMPTS = 16, 16, 8
"""Texts of the copy: validation, items that are scored, prompts that a teacher writes for."""
_T = TypeVar("_T")


class Size(NamedTuple):
    """How much there is to read, of the experiment or of its copy."""

    records: dict[str, int]
    """Of each split."""
    tokens: dict[tuple[str, str], int]
    """(Model, reading) → tokens of the training split."""


class Measured(NamedTuple):
    """What a job has taken."""

    loading: float
    """Seconds until its models were there."""
    working: float
    """Seconds of the rest, which grow with the texts."""
    peak: int
    """Bytes of the GPU, or of the process on a CPU."""
    written: int = 0


class RehearsedCell(NamedTuple):
    """What the first steps of an arm's cells have taken."""

    loading: float
    peak: int
    student: int
    """Bytes of the trained student's file."""
    checkpoint: int
    seen: Rehearsal


@dataclass(frozen=True)
class Cost:
    """Of a rule, over the whole grid."""

    rule: str
    jobs: int
    hours: float
    peak: int
    """Measured bytes of the largest job."""
    announced: float | None
    """What doctor and jobs estimate for it."""
    disk: float


@dataclass(frozen=True)
class TermPull:
    """A term of an arm before training, the mean of some batches."""

    arm: str
    term: str
    value: float
    weight: float
    gradient: float | None
    """Norm of its weighted gradient on the student relative to that of the cross-entropy; None where that has none."""
    suggested: float | None
    """Weight at which all terms beside cross-entropy together pull as hard as it does, each the same."""


@dataclass(frozen=True)
class CellCost:
    """Of an arm's cells, each."""

    arm: str
    step_seconds: float
    hours: float
    peak: int


@dataclass(frozen=True)
class Preflight:
    """What was found."""

    terms: list[TermPull]
    cells: list[CellCost]
    rules: list[Cost]

    @property
    def hours(self) -> float:
        """Of the whole grid, one job after the other."""
        return sum(cost.hours for cost in self.rules)

    @property
    def disk(self) -> float:
        """Bytes of the whole grid."""
        return sum(cost.disk for cost in self.rules)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "hours": self.hours, "disk": self.disk}


def preflight(
    config: Config, paths: Paths, arms: Iterable[str] = (), batches: int = 3, log: Callable[[str], Any] = print
) -> Preflight:
    """Measure a small copy of an experiment.

    Args:
        config: the experiment's.
        paths: its artefacts; the copy lies in a folder there, which goes at the end.
        arms: those that are measured; all by default. Hours are those of their cells.
        batches: of training, for each arm.
        log: takes a line for each job.

    Raises:
        KeyError: no such arm.
        RuntimeError: a job was killed, for want of memory as a rule.
    """
    dag, root = Dag(config), paths.preflight
    chosen = [name for name in dag.arms if not arms or name in set(arms)]
    for name in arms:
        dag.arm(name)
    shutil.rmtree(root, ignore_errors=True)
    copy, copied = smaller(config), Paths(root)
    try:
        log("models, splits and tokens …")
        whole, small = apart(config, make_copy, config, paths, copied, batches)
        parts = Copied(copy, copied, chosen)
        measured: dict[tuple[str, ...], Measured] = {}
        for name, job in parts.jobs:
            log(f"{' '.join([name, *job.values()])} …")
            measured[name, *job.values()] = apart(copy, measure_job, copy, copied, name, job)
        cells = {}
        for arm in chosen:
            log(f"{batches} steps of {arm} …")
            cells[arm] = apart(copy, measure_cell, copy, copied, arm, config.seeds[0], batches)
        for name in ("untrained", *(f"teacher {teacher}" for teacher in parts.judged)):
            log(f"scoring, {name} …")
            measured["score", name] = apart(copy, measure_scoring, copy, copied, name.removeprefix("teacher "))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    announced = {need.rule: need.host for need in needs(Workload(config, paths), lambda rule: 0)}
    scale = Scaling(config, chosen, whole, small, announced)
    return Preflight(
        [line for arm in chosen for line in term_pulls(arm, cells[arm].seen.terms)],
        [scale.cell(arm, cell) for arm, cell in cells.items()],
        scale.rules(measured, cells),
    )


def apart(config: Config, function: Callable[..., _T], *arguments: Any) -> _T:
    """A call in a process of its own, so that its peak of memory is its own, too.

    Raises:
        RuntimeError: the process was killed.
    """
    # what CUDA has begun cannot be forked, and nothing of a torch without CUDA has begun
    kind = "fork" if torch.version.cuda is None and hasattr(os, "fork") else "spawn"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(kind)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            what = " ".join(str(argument) for argument in arguments if isinstance(argument, str | dict))
            raise RuntimeError(
                f"preflight: the process of {function.__name__} {what} was killed; memory ran out as a rule: see what "
                "`kvpipe doctor` announces for it, and run preflight where there is more"
            ) from None


# ---------------------------------------------------------------- the copy
def smaller(config: Config) -> Config:
    """The copy's configuration: one shard, few texts of what reads a number of them."""
    mapped = {"examples": min(config.layer_map.examples, VALIDATION), "warmup_steps": 0}
    return config.model_copy(
        update={
            "store": config.store.model_copy(update={"shards": 1}),
            "layer_map": config.layer_map.model_copy(update=mapped),
            "teacher_text": config.teacher_text.model_copy(update={"tries": 1}),
        }
    )


def make_copy(config: Config, paths: Paths, copied: Paths, batches: int) -> tuple[Size, Size]:
    """Make what the experiment's texts and tokens are, and the copy's models and splits; how large both are.

    Training texts are those of all lengths, the longest among them: by length as batches are.
    """
    inputs = Inputs(config, paths)
    steps = inputs.steps
    encodings = [job for job in steps["encode"].jobs() if job["reading"] != "written"]
    files = [*steps["data"].files(), *steps["model"].files()]
    files += [path for job in encodings for path in steps["encode"].makes(**job).values()]
    make(inputs, files, log=lambda *_: None)
    copied.root.mkdir(parents=True)
    models = copied.model(config.student).parent
    models.symlink_to(paths.model(config.student).parent.resolve())
    lengths = inputs.student_encoding("train").lengths
    order = np.argsort(lengths, kind="stable")
    kept = {
        "train": np.sort(order[spread(len(order), batches * config.train.batch_size)]),
        "validation": spread(len(inputs.records("validation")), VALIDATION),
        "test": spread(len(inputs.records("test")), TEST),
    }
    for split in SPLITS:
        records = inputs.records(split)
        copied.data(split).parent.mkdir(parents=True, exist_ok=True)
        write_records(copied.data(split), [records[i] for i in kept[split]])
    for teacher in {job["teacher"] for job in steps["teacher_text"].jobs()}:
        copied.teacher_text(teacher).parent.mkdir(parents=True, exist_ok=True)
        write_records(copied.teacher_text(teacher), _stand_in(read_records(copied.data("train"))))
    work = Workload(config, paths)
    tokens = {(job["model"], job["reading"]): inputs.encoding(**job, split="train").lengths for job in encodings}
    whole = {pair: int(found.sum()) for pair, found in tokens.items()}
    small = {pair: int(found[kept["train"]].sum()) for pair, found in tokens.items()}
    for job in steps["encode"].jobs():
        if job["reading"] == "written":  # what is not written yet is as long as the records' own
            whole[job["model"], "written"] = work.tokens(job["model"], "written")
            small[job["model"], "written"] = round(
                whole[job["model"], "written"] * len(kept["train"]) / max(1, len(lengths))
            )
    records_of = {split: len(inputs.records(split)) for split in SPLITS}
    return Size(records_of, whole), Size({split: len(kept[split]) for split in SPLITS}, small)


def _stand_in(records: list) -> list:
    """Records with the reasoning that a teacher would read, where it has written none yet."""
    return [read_as([record], "own" if record.teacher_reasoning else "student")[0] for record in records]


class Copied:
    """What of the copy is measured.

    Args:
        config: the copy's.
        paths: the copy's.
        arms: that are measured.
    """

    def __init__(self, config: Config, paths: Paths, arms: list[str]):
        self.dag = Dag(config)
        self.steps = table(self.dag, paths)
        self.arms = arms
        given = {paths.manifest(name) for name in config.models} | {paths.data(split) for split in SPLITS}
        given |= {paths.teacher_text(job["teacher"]) for job in self.steps["teacher_text"].jobs()}
        self._makers = {
            path: (name, job)
            for name, step in self.steps.items()
            if step.remade
            for job in step.jobs()
            for path in step.makes(**job).values()
            if path not in given
        }
        self.jobs: list[tuple[str, dict[str, str]]] = []
        for arm in arms:
            for need in self.steps["train"].needs(arm=arm, seed="0"):
                self._bring(need)
        taught = {teacher for arm in arms for teacher in self.dag.arms[arm].teachers}
        texts = [job for job in self.steps["teacher_text"].jobs() if job["teacher"] in taught]
        self.jobs += [("teacher_text", job) for job in texts]
        self.judged = [name for name in self.dag.judged_teachers if name in taught]

    def _bring(self, path: Path) -> None:
        if path in self._makers and self._makers[path] not in self.jobs:
            name, job = self._makers[path]
            for need in self.steps[name].needs(**job):
                self._bring(need)
            self.jobs.append((name, job))


# ---------------------------------------------------------------- in processes of their own
def measure_job(config: Config, paths: Paths, name: str, job: dict[str, str]) -> Measured:
    """Run a job of the copy."""
    torch.set_num_threads(config.train.threads)
    device = torch.device(resolve_device(config.train.device))
    if name == "teacher_text":
        prompts = len(read_records(paths.data("train")))
        shards = max(1, prompts // PROMPTS)
        config = config.model_copy(update={"teacher_text": config.teacher_text.model_copy(update={"shards": shards})})
        name, job = "teacher_text_shard", {**job, "shard": "0"}
    inputs, begun = Inputs(config, paths), time.perf_counter()
    if name in ("layer_map", "teacher_kv"):
        inputs.teacher_model(job["teacher"])
    loaded = time.perf_counter()
    run(inputs, name, **job)
    written = sum(path.stat().st_size for path in _written(inputs, name, job) if path.is_file())
    return Measured(loaded - begun, time.perf_counter() - loaded, peak_memory(device), written)


def _written(inputs: Inputs, name: str, job: dict[str, str]) -> list[Path]:
    if name == "teacher_kv":
        return list(inputs.paths.store(job["teacher"], job["reading"]).iterdir())
    return list(inputs.steps[name].makes(**job).values())


def measure_cell(config: Config, paths: Paths, arm: str, seed: int, batches: int) -> RehearsedCell:
    """Take the first steps of a cell of the copy."""
    begun, quiet = time.perf_counter(), lambda *_: None
    cell = load_cell(Inputs(config, paths), arm, seed, quiet)
    unused = paths.checkpoints(arm, seed)
    loop = Loop(cell, unused, Attempt(unused, resolve_device(config.train.device), 1), quiet)
    loading = time.perf_counter() - begun
    seen = loop.rehearse(batches)
    sizes = [parameter.numel() for parameter in cell.student.parameters()]
    learned = [p.numel() for part in (cell.student, cell.objective) for p in part.parameters() if p.requires_grad]
    student = sum(sizes) * weights_dtype(paths.model(config.student)).itemsize
    return RehearsedCell(loading, peak_memory(loop.accelerator.device), student, 12 * sum(learned), seen)


def measure_scoring(config: Config, paths: Paths, name: str) -> Measured:
    """Score the copy's test items with the student before training, or with a teacher."""
    from kvpipe.steps.evaluate import score_folder, score_untrained

    inputs, begun = Inputs(config, paths), time.perf_counter()
    if name == "untrained":
        score_untrained(inputs, paths.untrained)
    else:
        score_folder(inputs, paths.model(name), "test", paths.teacher_quality(name))
    return Measured(0.0, time.perf_counter() - begun, peak_memory(torch.device(resolve_device(config.train.device))))


# ---------------------------------------------------------------- from the copy to the grid
def term_pulls(arm: str, terms: dict[str, Pull]) -> list[TermPull]:
    """How hard the terms of an arm pull, and weights at which none drowns another."""
    cross_entropy = terms.get(CROSS_ENTROPY)
    base = cross_entropy.weight * cross_entropy.norm if cross_entropy is not None else 0.0
    others = len(terms) - (cross_entropy is not None)
    found = []
    for name, pull in terms.items():
        suggested = base / others / pull.norm if name != CROSS_ENTROPY and base and pull.norm else None
        relative = pull.weight * pull.norm / base if base else None
        found.append(TermPull(arm, name, pull.value, pull.weight, relative, suggested))
    return found


class Scaling:
    """From what a copy took to what the grid will.

    Args:
        config: the experiment's.
        arms: that are counted.
        whole: how much the experiment reads.
        small: how much its copy did.
        announced: rule → bytes by the formulas.
    """

    def __init__(self, config: Config, arms: list[str], whole: Size, small: Size, announced: dict[str, float]):
        self.config, self.dag, self.arms = config, Dag(config), arms
        self.whole, self.small, self.announced = whole, small, announced

    def records(self, split: str) -> float:
        """How many times as many records."""
        return self.whole.records[split] / max(1, self.small.records[split])

    def factor(self, name: str, job: tuple[str, ...]) -> float:
        """How many times as much a job of the grid reads."""
        if name == "encode":
            return self.records("train")
        if name == "teacher_kv":
            model, reading = job
            return self.whole.tokens[model, reading] / max(1, self.small.tokens[model, reading])
        if name == "layer_map":
            wanted = min(self.config.layer_map.examples, self.whole.records["validation"])
            return wanted / min(wanted, self.small.records["validation"])
        if name == "fit":
            wanted = self.dag.fit_arm(job[0]).fit.examples
            return min(wanted, self.whole.records["train"]) / min(wanted, self.small.records["train"])
        assert name == "teacher_text"
        asked = min(PROMPTS, self.small.records["train"])
        return self.config.teacher_text.tries * self.whole.records["train"] / asked

    def cell(self, arm: str, cell: RehearsedCell) -> CellCost:
        """Hours of a cell: its steps, and the validation losses between them."""
        train, seen = self.config.train, cell.seen
        steps = max(1, round(train.steps * self.dag.arms[arm].step_factor))
        evaluations = 1 + -(-steps // train.eval_every)
        validation = seen.validation_seconds * self.records("validation")
        hours = (cell.loading + steps * seen.step_seconds + evaluations * validation) / 3600
        return CellCost(arm, seen.step_seconds, hours, cell.peak)

    def rules(self, measured: dict[tuple[str, ...], Measured], cells: dict[str, RehearsedCell]) -> list[Cost]:
        """Every rule of the grid."""
        seeds, found = len(self.config.seeds), []
        for name in dict.fromkeys(name for name, *_ in measured if name != "score"):
            jobs = {tuple(job): one for (rule, *job), one in measured.items() if rule == name}
            factors = {job: self.factor(name, job) for job in jobs}
            seconds = sum(one.loading + factors[job] * one.working for job, one in jobs.items())
            if name == "layer_map" and not self.trained_before:
                seconds += (
                    len(jobs) * self.config.layer_map.warmup_steps * min(c.seen.step_seconds for c in cells.values())
                )
            disk = sum(
                one.written * (factors[job] if name in ("encode", "teacher_kv") else 1) for job, one in jobs.items()
            )
            found.append(self.cost(name, len(jobs), seconds, max(one.peak for one in jobs.values()), disk))
        costs = [self.cell(arm, cell) for arm, cell in cells.items()]
        disk = sum(seeds * cell.student for cell in cells.values()) + 2 * max(c.checkpoint for c in cells.values())
        hours, peak = 3600 * seeds * sum(cost.hours for cost in costs), max(cost.peak for cost in costs)
        found.append(self.cost("train", seeds * len(costs), hours, peak, disk))
        items = self.records("test")
        own = measured["score", "untrained"]
        found.append(self.cost("evaluate", seeds * len(cells), seeds * len(cells) * items * own.working, own.peak, 0))
        found.append(self.cost("untrained", 1, items * own.working, own.peak, 0))
        judges = [one for (rule, name, *_), one in measured.items() if rule == "score" and name != "untrained"]
        if judges:
            seconds = items * sum(one.working for one in judges)
            found.append(self.cost("teacher_quality", len(judges), seconds, max(one.peak for one in judges), 0))
        return found

    @property
    def trained_before(self) -> bool:
        """Whether the student has weights, so that a layer map trains no copy of it first."""
        return self.config.models[self.config.student].source != "scratch"

    def cost(self, rule: str, jobs: int, seconds: float, peak: int, disk: float | int) -> Cost:
        """A rule's line."""
        return Cost(rule, jobs, seconds / 3600, peak, self.announced.get(rule), float(disk))


# ---------------------------------------------------------------- shown
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

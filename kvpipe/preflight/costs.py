"""From what the copy took to what the whole grid will, and how hard each term of each arm pulls."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvpipe.config import Config
from kvpipe.config.arms import CROSS_ENTROPY
from kvpipe.experiment.plan import Dag
from kvpipe.preflight.copy import Size
from kvpipe.preflight.measure import PROMPTS, Measured, RehearsedCell
from kvpipe.train.step import Pull


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

"""What `kvpipe train --teacher` will cost, said before it is spent, and what came of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.table import Table

from kvpipe.data.records import render
from kvpipe.doctor.memory import needs
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.device import resolve_device, resolve_precision
from kvpipe.experiment.files import GB, read_json, read_table
from kvpipe.experiment.paths import ARMS, CONTRASTS, COST, HISTORY, PAIRS
from kvpipe.experiment.sizes import BASE
from kvpipe.stats.metrics import METRICS, PRIMARY
from kvpipe.stats.scores import ALL
from kvpipe.steps.inputs import Inputs

ROWS = 512
"""Of the matrix product that the rate is measured by."""
EFFICIENCY = 0.4
"""Share of that rate at which whole models run; a guess, which the table says is about right at best."""


def forecast(inputs: Inputs, cells: list[tuple[str, int]], scored: bool) -> Table:
    """Operations, time, disk and memory of what is still to be done, from shapes and counts; models and data are there.

    A token costs 2 operations a parameter when it is read, 6 when it is trained on, 8 with recomputed activations
    (Kaplan et al., arXiv:2001.08361). The time is that of so many operations in matrix products of the student's size,
    measured now, at `EFFICIENCY`. Memory is the process's, or the GPU's where there is one, as the doctor announces it.
    """
    config, dag, work = inputs.config, inputs.dag, Workload(inputs.config, inputs.paths)
    student = work.shape(config.student)
    assert student is not None
    train, examples = config.train, work.examples
    each = work.tokens(config.student) / max(1, examples)
    gpu = resolve_device(train.device) == "cuda"
    needed = {need.rule: (need.gpu if gpu else need.host) or 0.0 for need in needs(work, lambda rule: int(gpu))}
    parts: list[tuple[str, str, float, float, float]] = []
    for teacher, reading in work.missing_stores if any(dag.arms[arm].teachers for arm, _ in cells) else ():
        shape, tokens, disk = work.shape(teacher), work.tokens(teacher, reading), work.store_bytes(teacher, reading)
        memory = (work.pass_bytes(teacher, reading, on_gpu=gpu) or 0) + (0 if gpu else BASE)
        assert shape is not None
        parts.append((f"{teacher} reads", f"{tokens:,} tokens", 2 * shape.parameters * tokens, disk or 0, memory))
    seen = len(cells) * train.steps * train.batch_size * each
    backward = 8 if train.gradient_checkpointing else 6
    saved = len(cells) * 4 * student.parameters
    what = f"{len(cells)} × {train.steps} steps, {seen:,.0f} tokens"
    parts.append(("training", what, backward * student.parameters * seen, saved, needed["train"]))
    if scored:
        records = inputs.records("test")
        texts = [render(record, config.data.template).text for record in records]
        answers = sum(
            config.evaluate.of(record.task).max_new_tokens for record in records if _generates(config, record)
        )
        read = sum(len(text.encode()) for text in texts) / 3.5 + answers
        what = f"{len(cells)} × {len(records)} items, at most {len(cells) * read:,.0f} tokens"
        parts.append(("scoring", what, 2 * student.parameters * len(cells) * read, 0, needed["evaluate"]))
    rate = EFFICIENCY * measured_rate(inputs, student.hidden, student.intermediate)
    table = Table(title="About what it will cost", title_justify="left")
    for name in ("step", "how much", "operations", "time", "disk", "memory"):
        table.add_column(name, justify="left" if name in ("step", "how much") else "right")
    for name, what, operations, disk_bytes, memory_bytes in parts:
        sizes = (f"{size / GB:.2f} GB" if size else "" for size in (disk_bytes, memory_bytes))
        table.add_row(name, what, f"{operations:.1e}", _clock(operations / rate), *sizes)
    whole = sum(part[2] for part in parts), sum(part[3] for part in parts)
    most = max(part[4] for part in parts)
    table.add_section()
    table.add_row(
        "all", "", f"{whole[0]:.1e}", _clock(whole[0] / rate), f"{whole[1] / GB:.2f} GB", f"{most / GB:.2f} GB"
    )
    return table


def _generates(config, record) -> bool:
    return config.evaluate.of(record.task).scorer in ("exact", "number", "math", "code")


def measured_rate(inputs: Inputs, width: int, inner: int) -> float:
    """Operations a second of a matrix product of the student's size, in the precision of training."""
    train = inputs.config.train
    torch.set_num_threads(train.threads)
    device = resolve_device(train.device)
    precision = resolve_precision(train.precision, device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    x, y = (torch.ones(shape, dtype=dtype, device=device) for shape in ((ROWS, width), (width, inner)))

    def once() -> float:
        begun = time.perf_counter()
        product = x @ y
        product[0, 0].item()  # waits for a GPU
        return time.perf_counter() - begun

    return 2 * ROWS * width * inner / min(once() for _ in range(8))


def _clock(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


# ---------------------------------------------------------------- what came of it
def trained(cell: Path) -> Table:
    """A cell's validation loss before and after, and what it took."""
    lines = [json.loads(line) for line in (cell / HISTORY).read_text(encoding="utf-8").splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    cost = read_json(cell / COST, "train the cell again")
    table = Table("", "before", "after", title="Validation", title_justify="left")
    table.add_row("loss of reasoning and answer, nats a token", f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
    table.add_row("tokens trained on", "0", f"{cost['tokens']:,}")
    table.add_row("training time", "", _clock(cost["train_seconds"]))
    table.add_row("peak memory", "", f"{cost['peak_memory_bytes'] / GB:.2f} GB")
    return table


def compared(inputs: Inputs) -> Table:
    """Every main metric of the test split: control, the other arm, and the difference with its interval."""
    config, paths = inputs.config, inputs.paths
    (arm,) = (name for name in config.arms if name != config.control)
    means = {
        (r.arm, r.metric): r.mean for r in read_table(paths.stats / ARMS, "run it again").itertuples() if r.task == ALL
    }
    table = Table("", "control", arm, "difference", title=_title(inputs), title_justify="left")
    for row in read_table(paths.stats / CONTRASTS, "run it again").itertuples():
        metric = METRICS[row.metric]
        if row.task != ALL or not metric.main or (arm, metric.name) not in means:
            continue
        shown = [f"{metric.shown(means[name, metric.name]):.{metric.digits}f}" for name in (config.control, arm)]
        table.add_row(metric.title, *shown, _difference(paths, metric, row))
    return table


def _title(inputs: Inputs) -> str:
    seeds, items = len(inputs.config.seeds), len(inputs.records("test"))
    return f"Test split: {items} items, {seeds} seed{'s' if seeds > 1 else ''}; {inputs.config.stats.confidence:.0%} intervals"


def _difference(paths, metric, row) -> str:
    """A ratio or a difference; with one seed the interval of the items alone, which says nothing of other seeds."""
    if row.verdict in ("better", "worse", "undecided"):
        if metric.is_ratio:
            return f"× {row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f}), {row.verdict}"
        bounds = [metric.factor * value for value in (row.estimate, row.difference_low, row.difference_high)]
        return "{:+.{d}f} ({:+.{d}f} to {:+.{d}f}), ".format(*bounds, d=metric.digits) + row.verdict
    if metric.name == PRIMARY.name:
        found = [pair for pair in read_table(paths.stats / PAIRS, "run it again").itertuples() if pair.arm == row.arm]
        if len(found) == 1:
            return f"{found[0].bits_per_byte:+.3f} ({found[0].low:+.3f} to {found[0].high:+.3f}), of the items alone"
    return row.verdict

"""The report's tables: plain rows of text for the template, every missing number with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite, log
from typing import Any

import numpy as np
import pandas as pd

from kvpipe.config import Arm
from kvpipe.experiment.paths import SPLITS
from kvpipe.report.collect import Results
from kvpipe.report.wording import DASH, VERDICTS, change, detectable, number, p_value, ratio, shown, signed
from kvpipe.stats.metrics import METRICS
from kvpipe.stats.scores import ALL, UNTRAINED


@dataclass(frozen=True)
class Cell:
    """One entry: text, interval beneath it, a footnote letter, and whether it is the best of its column."""

    text: str
    interval: str = ""
    note: str = ""
    best: bool = False


@dataclass
class Notes:
    """Footnotes of a table, lettered in the order of first use."""

    texts: list[str] = field(default_factory=list)

    def letter(self, text: str) -> str:
        """The letter of a footnote."""
        if text not in self.texts:
            self.texts.append(text)
        return chr(ord("a") + self.texts.index(text))

    def items(self) -> list[tuple[str, str]]:
        """(letter, text)."""
        return [(self.letter(text), text) for text in self.texts]


# ---------------------------------------------------------------- what was run
def arm_rows(results: Results) -> list[dict[str, Any]]:
    """Each arm's components; those that differ from the arm it is based on are marked."""
    rows = []
    for name in results.arm_order:
        arm = results.dag.arms[name]
        base = results.config.arms[name].base
        parts, before = components(arm), components(results.dag.arms[base]) if base else {}
        rows.append(
            {
                "name": name,
                "role": arm.role,
                "label": arm.label,
                "base": base or "",
                "parts": [(text, bool(base) and text != before.get(key)) for key, text in parts.items()],
                "missing": results.missing_seeds(name),
            }
        )
    return rows


def components(arm: Arm) -> dict[str, str]:
    """An arm's settings in words; a dash where the component plays no part in it."""
    text = "" if arm.reading == "student" else f", {arm.student_reasoning} reasoning"
    out = dict.fromkeys(("teachers", "time", "layer", "projector", "fit", "fusion"), DASH) | {"loss": "CE" + text}
    if not arm.teachers:
        return out
    out["teachers"] = ", ".join(arm.teachers) + (" (shuffled)" if arm.shuffle_teacher else "")
    read = frozenset().union(*(term.reads for term in arm.loss.values()))
    if len(arm.teachers) > 1 and "fuse" in read:
        rows = getattr(arm.fuse, "weights", {})
        table = rows if isinstance(rows, dict) else {"": rows}
        out["fusion"] = arm.fuse.kind + "".join(f" {t} {'/'.join(f'{w:g}' for w in row)}" for t, row in table.items())
    out["time"] = "same byte end"
    if "time" in read:
        mode = f" ({arm.time.mode})" if arm.time.kind != "position" else ""
        out["time"] = (
            arm.time.kind + mode + {"own": ", own text", "written": ", own text as written"}.get(arm.time.text, "")
        )
        out["time"] += ", inside segments" if arm.time.borders == "keep" else ""
    if "layer" in read:
        layer = arm.layer
        out["layer"] = f"CKA top-{layer.k}, {layer.combine}" if layer.kind == "cka" else layer.kind
        out["projector"] = f"{arm.projector.kind}, {arm.projector.mode}"
        out["fit"] = arm.fit.method
    short = {"cross_entropy": "CE"}
    terms = [(short.get(name, name.replace("_", " ")), term.weight) for name, term in arm.terms.items()]
    parts = [name if weight == 1 and name == "CE" else f"{weight:g} {name}" for name, weight in terms if weight]
    return out | {"loss": " + ".join(parts) + text}


def sizes(results: Results) -> list[dict[str, Any]]:
    """Examples of each split per task."""
    counts = {split: pd.Series([r.task for r in results.records(split)]).value_counts() for split in SPLITS}
    return [
        {"task": task, **{split: int(count.get(task, 0)) for split, count in counts.items()}} for task in results.tasks
    ]


# ---------------------------------------------------------------- results
def result_rows(results: Results, metrics: list[str], task: str, notes: Notes) -> list[dict[str, Any]]:
    """One row per arm with one cell per metric, the untrained student first."""
    best = {metric: _best(results, metric, task) for metric in metrics}
    rows = []
    for arm in [UNTRAINED, *results.arm_order]:
        cells = [_cell(results, arm, metric, task, notes, arm == best[metric]) for metric in metrics]
        rows.append({"name": arm, "role": results.role(arm), "cells": cells})
    return rows


def task_rows(results: Results, notes: Notes) -> list[dict[str, Any]]:
    """One row per arm: bits per byte, perplexity and accuracy of every task."""
    parts = [
        result_rows(results, [name for name, m in METRICS.items() if m.main], task, notes) for task in results.tasks
    ]
    return [{**rows[0], "cells": [cell for row in rows for cell in row["cells"]]} for rows in zip(*parts, strict=True)]


def _best(results: Results, metric: str, task: str) -> str | None:
    found = {a: results.arms.get((a, metric, task)) for a in results.arm_order}
    # the mean of the seeds that are left is no mean to be best by
    whole = len(results.config.seeds)
    known = {arm: e.mean for arm, e in found.items() if e is not None and e.known and e.n_seeds >= whole}
    if not known:
        return None
    return (max if METRICS[metric].higher_is_better else min)(known, key=lambda arm: known[arm])


def _cell(results: Results, arm: str, metric: str, task: str, notes: Notes, best: bool) -> Cell:
    estimate = results.arms.get((arm, metric, task))
    if estimate is None or not estimate.known:
        return Cell(DASH, note=notes.letter(_reason(results, arm, metric, estimate is None)))
    interval = ""
    if isfinite(estimate.low) and isfinite(estimate.high):
        interval = f"{shown(metric, estimate.low)} to {shown(metric, estimate.high)}"
    note, seeds = "", len(results.config.seeds)
    if arm != UNTRAINED and estimate.n_seeds < seeds:
        missing = results.missing_seeds(arm)
        why = f"{arm}: seed {', '.join(map(str, missing))} not finished" if missing else "the others never reached it"
        note = notes.letter(f"Mean of {estimate.n_seeds} of {seeds} seeds: {why}.")
    return Cell(shown(metric, estimate.mean), interval, note, best)


def _reason(results: Results, arm: str, metric: str, no_row: bool) -> str:
    if arm == UNTRAINED and METRICS[metric].per != "item":
        return "Not trained."
    missing = [] if arm == UNTRAINED else results.missing_seeds(arm)
    if missing:
        return f"{arm}: seed {', '.join(map(str, missing))} not finished."
    if no_row:
        return f"The statistics hold no {METRICS[metric].label} for this arm."
    if not METRICS[metric].tested:
        return "No seed reached the final validation loss of control."
    return f"The statistics hold a missing value of {METRICS[metric].label} for this arm."


# ---------------------------------------------------------------- contrasts
def contrast_rows(results: Results) -> list[dict[str, Any]]:
    """Every contrast of the statistics on all tasks together, grouped by metric."""
    rows = []
    for name, metric in METRICS.items():
        for c in (c for c in results.contrasts.values() if (c.metric, c.task) == (name, ALL)):
            low, high = (signed(metric.factor * x, metric.digits) for x in (c.low_corrected, c.high_corrected))
            rows.append(
                {
                    "metric": name,
                    "size": f"{c.n_seeds} × {c.n_items}",
                    "arm": c.arm,
                    "reference": c.reference,
                    "role": results.role(c.arm),
                    "ratio": ratio(c),
                    "change": change(c),
                    "p": p_value(c.p_dunnett),
                    "effect": signed(c.effect_size_seeds, 1),
                    "detectable": detectable(c),
                    "verdict": c.verdict,
                    "verdict_text": VERDICTS[c.verdict],
                    "bootstrap": f"{low} to {high}" if c.tested else DASH,
                    "bonferroni": p_value(c.p_bonferroni) if c.tested else DASH,
                    "holm": p_value(c.p_holm) if c.tested else DASH,
                }
            )
    return rows


def pair_rows(results: Results) -> list[dict[str, Any]]:
    """Pairs of trained models of one seed on the same items, from `pairs.csv`."""
    return [
        {
            "arm": row.arm,
            "reference": row.reference,
            "seed": row.seed,
            "task": row.task,
            "bits": f"{signed(row.bits_per_byte)} ({signed(row.low)} to {signed(row.high)})",
            "right": f"{row.right_only_arm:.0f}, {row.right_only_reference:.0f} of {row.n_items}"
            if isfinite(row.p_mcnemar)
            else DASH,
            "p": p_value(row.p_mcnemar),
        }
        for row in results.pairs.itertuples()
    ]


# ---------------------------------------------------------------- fusion weights
def fusion_weights(results: Results) -> pd.DataFrame:
    """Arm, task, then one column per teacher: its share of the fused target at the end of training.

    Mean over the last quarter of the logged steps and over seeds; positions without a target have no weight, so rows
    are scaled to sum to 1.
    """
    rows = []
    for arm in (name for name in results.arm_order if len(results.dag.arms[name].teachers) > 1):
        frames = [
            h.steps.iloc[len(h.steps) * 3 // 4 :] for h in results.histories.get(arm, {}).values() if len(h.steps)
        ]
        for task in results.tasks:
            found = {t: _mean(frames, f"weight/{task}/{t}") for t in results.dag.arms[arm].teachers}
            total = sum(found.values())
            if isfinite(total) and total > 0:
                rows.append({"arm": arm, "task": task, **{t: w / total for t, w in found.items()}})
    return pd.DataFrame(rows)


def _mean(frames: list[pd.DataFrame], column: str) -> float:
    values = [frame[column].mean() for frame in frames if column in frame.columns]
    return float(np.mean(values)) if values else float("nan")


# ---------------------------------------------------------------- teachers
def teacher_rows(results: Results) -> list[dict[str, Any]]:
    """Quality of each teacher on the test items, per task."""
    columns = ("items", "bits", "perplexity", "accuracy")
    rows = []
    for teacher in results.dag.judged_teachers:
        frame = results.teacher_items.get(teacher)
        if frame is None:
            rows.append({"teacher": teacher, "task": "not measured", **dict.fromkeys(columns, DASH)})
            continue
        for task in results.tasks:
            part = frame[frame["task"] == task]
            cells, scored = dict.fromkeys(columns, DASH), part["correct"].dropna()
            if len(part):
                cells = {
                    "items": str(len(part)),
                    "bits": number(part["nll"].sum() / part["bytes"].sum() / log(2), 3),
                    "perplexity": number(float(np.exp(part["nll"].sum() / part["tokens"].sum())), 2),
                    # answers of some tasks are not scored: plain text, conversations
                    "accuracy": number(100 * float(scored.mean()), 1) if len(scored) else DASH,
                }
            rows.append({"teacher": teacher, "task": task, **cells})
    return rows


def text_rows(results: Results) -> list[dict[str, Any]]:
    """What teachers have written for the training prompts, by task."""
    return [
        {
            "teacher": teacher,
            "task": task,
            "asked": f"{counts['asked']:,}",
            "kept": number(100 * counts["kept"] / max(1, counts["asked"]), 1),
            "tries": " / ".join(map(str, counts["kept_at_try"])),
            "bytes": number(counts["mean_bytes"], 0),
            "reference": number(counts["mean_bytes_of_reference"], 0),
        }
        for teacher, found in results.text_counts.items()
        for task, counts in found["tasks"].items()
    ]


def store_rows(results: Results) -> list[dict[str, Any]]:
    """Size and fidelity of the teacher KV stores."""
    return [
        {
            "teacher": teacher,
            "reading": {
                "student": "the records’ text",
                "own": "its own longer reasoning",
                "written": "what it has written",
            }[reading],
            "dtype": index["key"]["dtype"],
            "layers": ", ".join(map(str, index["key"]["layers"])),
            "rows": f"{index['rows']:,}",
            "per_token": number(index["bytes_per_token"], 0),
            "total": number(index["rows"] * index["bytes_per_token"] / 1e6, 1),
            "cosine": number(index["attention_cosine"], 6),
        }
        for (teacher, reading), index in results.stores.items()
    ]

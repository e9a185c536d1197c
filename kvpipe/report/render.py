"""Finished artefacts → one self-contained HTML file."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from kvpipe import __version__
from kvpipe.config import LOSS_ON, Config
from kvpipe.data.records import render
from kvpipe.experiment.files import write_text
from kvpipe.experiment.paths import Paths
from kvpipe.report import figures, tables, wording
from kvpipe.report.alignment import token_alignment
from kvpipe.report.collect import ROLES, Results
from kvpipe.report.readings import read_example
from kvpipe.stats.metrics import METRICS, PRIMARY
from kvpipe.stats.scores import ALL

SAMPLES_PER_TASK = 3
ROLE_TEXTS = {
    "control": "trained on the text alone; everything is compared with it",
    "experiment": "learns from teachers too; one that is built on another shows what its own components add",
    "ablation": "another arm with some settings changed",
    "baseline": "what one would use instead of this method; a method worth using beats it",
    "null": "contains no usable teacher knowledge; if it beat control, the benefit would not come from the teacher",
}


def write_report(config: Config, paths: Paths, out: Path) -> None:
    """Write the report of a results folder.

    Args:
        config: the experiment.
        paths: its results; the statistics must be there, anything else that is absent is named in the text.
        out: the HTML file; everything is inside it (styles, figures), nothing is loaded from elsewhere.

    Raises:
        FileNotFoundError: `stats/arms.csv` or `stats/contrasts.csv` is missing.
        ValueError: a table lacks a column.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("kvpipe.report").joinpath("template.html").read_text(encoding="utf-8")
    text = environment.from_string(source).render(**content(Results(config, paths)))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)


def content(results: Results) -> dict[str, Any]:
    """Everything the template shows."""
    result_notes, task_notes = tables.Notes(), tables.Notes()
    weights = tables.fusion_weights(results)
    found = {metric for _, metric, _ in results.arms}
    shown = {name: metric for name, metric in METRICS.items() if not metric.column or name in found}
    return {
        "version": __version__,
        "config": results.config,
        "roles": [
            (role, ROLE_TEXTS[role]) for role in ROLES if any(results.role(a) == role for a in results.arm_order)
        ],
        "conclusions": wording.conclusions(results),
        "absent": results.absent,
        "cells_done": len(results.dag.cells) - len(results.missing_cells),
        "cells": len(results.dag.cells),
        "arms": tables.arm_rows(results),
        "sizes": tables.sizes(results),
        "training": training(results),
        "metrics": shown,
        "main": [metric for metric in METRICS.values() if metric.main],
        "result_rows": tables.result_rows(results, list(shown), ALL, result_notes),
        "result_notes": result_notes.items(),
        "tasks": results.tasks,
        "task_rows": tables.task_rows(results, task_notes),
        "task_notes": task_notes.items(),
        "forest": figures.forest(results),
        "contrast_rows": tables.contrast_rows(results),
        "references": results.arm_order,
        "level": wording.level(results),
        "primary": PRIMARY.name,
        "pairs": tables.pair_rows(results),
        "curves": figures.learning_curves(results),
        "similarity": figures.layer_similarity(results),
        "alignments": token_alignment(results),
        "read_example": read_example(results),
        "text_rows": tables.text_rows(results),
        "fusion": figures.fusion_weights(weights),
        "explained": figures.explained_variance(results),
        "teacher_rows": tables.teacher_rows(results),
        "store_rows": tables.store_rows(results),
        "samples": samples(results),
        "samples_seed": results.config.seeds[0],
        "audit": results.audit,
        "doctor": results.doctor,
        "control": results.control,
        "headline": results.headline,
        "example_arm": results.headline or results.arm_order[-1],
        "provenance": provenance(results),
        "models": model_rows(results),
    }


def training(results: Results) -> list[tuple[str, str]]:
    """What all cells share, and what they measured."""
    train = results.config.train
    out = [
        ("seeds", ", ".join(map(str, results.config.seeds))),
        ("optimizer steps", f"{train.steps} of {train.batch_size} examples"),
        ("peak learning rate", f"{train.learning_rate:g}, cosine schedule, {100 * train.warmup:g}% warm-up"),
        ("cross-entropy on", LOSS_ON[train.loss_on]),
        ("precision", train.precision),
    ]
    out += [(f"answers of {task} judged by", ", ".join(judges)) for task, judges in results.judges.items() if judges]
    for name, label, digits in (("tokens", "student tokens per cell", 0), ("padding_share", "share of padding", 4)):
        values = sorted(cost[name] for cost in results.costs.values())
        if values:
            low, high = (f"{v:,.{digits}f}" for v in (values[0], values[-1]))
            out.append((label, low if low == high else f"{low} to {high}"))
    restarts = sum(cost["restarts"] for cost in results.costs.values())
    out.append(("restarts after an interruption", str(restarts)))
    return out


def samples(results: Results) -> list[dict[str, Any]]:
    """The first test items of every task, whatever came out, as control and the headline answered them."""
    seed = results.config.seeds[0]
    names = [name for name in (results.control, results.headline) if name]
    found = {name: results.items(name, seed) for name in names}
    frames = {name: frame.set_index("id") for name, frame in found.items() if frame is not None}
    out = []
    for task in results.tasks:
        for record in [r for r in results.records("test") if r.task == task][:SAMPLES_PER_TASK]:
            answers = [
                {
                    "arm": name,
                    "correct": bool(frame.loc[record.id, "correct"]),
                    "text": _said(frame.loc[record.id]).strip("\n"),
                }
                for name, frame in frames.items()
                if record.id in frame.index and frame.loc[record.id, "correct"] is not None
            ]
            if answers:
                text = render(record, results.config.data.template)
                reference = (text.reasoning + text.answer).strip("\n")
                out.append({"record": record, "reference": reference, "answers": answers})
    return out


def _said(item) -> str:
    """What was generated; of a multiple choice, where nothing is, the choice."""
    return item["text"] if isinstance(item["text"], str) else str(item["prediction"])


def provenance(results: Results) -> list[tuple[str, list[str]]]:
    """Each item with all values that the cells recorded: more than one means that they were not made alike."""
    documents = [cost["provenance"] for cost in results.costs.values()]
    flat = [
        {**{k: v for k, v in d.items() if k not in ("packages", "arm", "seed")}, **d.get("packages", {})}
        for d in documents
    ]
    keys = list(dict.fromkeys(key for document in flat for key in document))
    labels = {"git_commit": "git commit", "config_hash": "configuration hash"}
    return [(labels.get(k, k), sorted({str(d.get(k) or "none") for d in flat})) for k in keys]


def model_rows(results: Results) -> list[dict[str, str]]:
    """Each model's source and the sha256 of its weights, or of its config where it has none."""
    rows = []
    for name in results.config.models:
        manifest = results.manifests.get(name)
        if manifest is None:
            rows.append({"name": name, "source": "not built", "file": "", "sha256": ""})
            continue
        source = manifest["source"]
        details = [f"{key} {source[key]}" for key in ("path", "repo", "commit", "like") if source.get(key)]
        weights = [f for f in manifest["files"] if f.endswith(".safetensors")] or ["config.json"]
        for file in weights:
            words = ": ".join([source.get("source", ""), ", ".join(details)]) if details else source.get("source", "")
            rows.append({"name": name, "source": words, "file": file, "sha256": manifest["files"][file]})
    return rows

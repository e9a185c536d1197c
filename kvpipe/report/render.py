"""Finished artefacts → one self-contained HTML file, and its figures and tables as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure

from kvpipe.config import Config
from kvpipe.data.records import render
from kvpipe.experiment.files import write_text
from kvpipe.experiment.paths import FIGURES, Paths
from kvpipe.report import style, tables, wording
from kvpipe.report.alignment import shown_example, time_mode
from kvpipe.report.collect import ROLES, Results
from kvpipe.report.figures import DRAWERS
from kvpipe.report.html import filled
from kvpipe.report.readings import read_example
from kvpipe.stats.metrics import METRICS, PRIMARY

SAMPLES_PER_TASK = 3


def write_report(config: Config, paths: Paths, out: Path) -> None:
    """Write the report of a results folder, and beside it `figures/` (SVG, PDF) and `tables/` (CSV, LaTeX).

    Beside another page `x.html` they are in `x/`.

    Args:
        config: the experiment.
        paths: its results; the statistics must be there, anything else that is absent is named in the text.
        out: the HTML file; everything is inside it (styles, figures), nothing is loaded from elsewhere.

    Raises:
        FileNotFoundError: `stats/arms.csv` or `stats/contrasts.csv` is missing.
        ValueError: a table lacks a column.
    """
    results = Results(config, paths)
    figures = {name: figure for name, draw in DRAWERS.items() if (figure := draw(results)) is not None}
    built = tables.tables(results)
    beside = Paths(out.parent if out == paths.report else out.with_suffix(""))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page(results, built, figures))
    for folder in (beside.figures, beside.table_files):
        folder.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        style.save_figure(figures[name] if name in figures else style.nothing(name), beside.figures / name)
    for name, table in built.items():
        table.write(beside.table_files / name)


def page(results: Results, built: dict[str, tables.Table], figures: dict[str, Figure]) -> str:
    """The HTML, with those figures that there are."""
    shown = content(results, built) | {"figures": _inlined(figures)}
    return filled("template.html", shown)


def _inlined(figures: dict[str, Figure]) -> dict[str, Any]:
    return {
        name: style.inline(figure, (DRAWERS[name].__doc__ or name).split("\n\n")[0]) for name, figure in figures.items()
    }


def content(results: Results, filed: dict[str, tables.Table]) -> dict[str, Any]:
    """Everything the template shows but the figures."""
    findings = {"audit": results.audit, "doctor": results.doctor}
    example, read = shown_example(results), read_example(results)
    metrics = [name for name in tables.shown_metrics(results) if tables.contrasts(results, name).rows]
    return {
        "config": results.config,
        "roles": [role for role in ROLES if results.of_role(role)],
        "question": wording.question(results),
        "answer": wording.answer(results),
        "cost": wording.cost(results),
        "conclusions": wording.conclusions(results),
        "absent_lines": results.absent,
        "level": wording.level(results),
        "cells_done": len(results.dag.cells) - len(results.missing_cells),
        "cells": len(results.dag.cells),
        "tables": {
            **filed,
            "training": tables.training(results),
            "pairs": tables.pairs(results),
            "layers": tables.chosen_layers(results),
            "teachers": tables.teachers(results),
            "stores": tables.stores(results),
            "written": tables.written(results),
            "audit": tables.checks((findings["audit"] or {}).get("checks", []), "Fairness audit."),
            "doctor": tables.checks((findings["doctor"] or {}).get("findings", []), "What the doctor found."),
            "provenance": tables.provenance(results),
            "models": tables.models(results),
        },
        "contrasts": [(METRICS[name], tables.contrasts(results, name)) for name in metrics if name != PRIMARY.name],
        "primary": PRIMARY,
        "power": f"{100 * results.config.stats.power:g}%",
        "margin": f"{100 * results.config.stats.margin:g}%",
        "tasks": results.tasks,
        "control": results.control,
        "headline": results.headline,
        "example": {"teacher": example[0], "record": example[1].id, "mode": time_mode(results)} if example else None,
        "read": read and (read.record, *tables.readings(read)),
        "lossless": [", ".join(results.fit_users(name)) for name in results.lossless_fits],
        "samples": samples(results),
        "arm": results.headline or results.arm_order[-1],
        "configuration": yaml.safe_dump(
            results.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110
        ),
    }


def samples(results: Results) -> list[dict[str, Any]]:
    """The first test items of every task, whatever came out, as control and the headline answered them."""
    seed = results.config.seeds[0]
    names = dict.fromkeys([results.control, *([results.headline] if results.headline else [])])
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

"""One student from teachers, a student and data, without a configuration file: `kvpipe train --teacher …`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpipe.config import Config, ConfigError, FileData, HubModel, overridden, parse
from kvpipe.config.errors import nearest
from kvpipe.config.presets import PRESETS
from kvpipe.data.rows import read_rows
from kvpipe.experiment.files import GB, digest_of, write_json
from kvpipe.experiment.paths import STUDENT, Paths
from kvpipe.experiment.plan import digest

ARM = "distil"
"""The arm that learns from the teachers; `control` trains the same student without them."""
TASK = "text"
MAX_LENGTH = 1024
"""Tokens of a preset's longest text."""
FEWEST = 20
"""Rows of a file, so that each of its parts has one."""
PARTS = {"train": "[:90%]", "validation": "[90%:95%]", "test": "[95%:]"}
FIELDS = {"prompt": True, "answer": True, "reasoning": False, "teacher_reasoning": False}
"""Columns that are read, and whether the file must have them."""
EXPERIMENT_FILE = "experiment.json"


@dataclass(frozen=True)
class Method:
    """What `kvpipe train --teacher` is told of the method."""

    fusion: str | None = None
    projector: str | None = None
    terms: tuple[str, ...] = ()
    """`name` or `name=weight`; keys and values without any."""

    def arm(self, teachers: list[str]) -> dict[str, Any]:
        """The settings of an arm."""
        loss: dict[str, Any] = {} if self.terms else {"keys": {}, "values": {}}
        for term in self.terms:
            name, _, weight = term.partition("=")
            try:
                loss[name] = {"weight": float(weight)} if weight else {}
            except ValueError:
                raise ConfigError(f"--term {term}: expected name or name=weight, as in values=3") from None
        found: dict[str, Any] = {"teachers": teachers, "loss": loss}
        # ridge goes onto the student's own keys and values, which only terms on caches look at
        if {"keys", "values", "attention", "attention_kl"} & loss.keys():
            found["fit"] = {"method": {"elastic": "reconstruct", "heads": "random"}.get(self.projector or "", "ridge")}
        found |= {"projector": {"kind": self.projector}} if self.projector else {}
        return found | ({"fuse": {"kind": self.fusion}} if self.fusion else {})


def experiment(
    teachers: Sequence[str | Path],
    student: str | Path,
    data: str | Path,
    out: Path,
    overrides: list[str] | None = None,
    method: Method = Method(),
    seeds: Sequence[int] = (0,),
) -> tuple[Config, Paths]:
    """The configuration of one arm and its control, and the folder of its artefacts below `out`.

    The student's keys and values are regressed on the teachers' (`ridge`), so that the target lies in the space that
    its own weights work in; `--set` changes this and everything else.

    Args:
        teachers: model folders, or hub ids.
        student: a model folder with weights, or a hub id.
        data: a preset (`gsm8k`), of which `gsm8k[:2000]` trains on the first rows; or JSONL or Parquet with the columns
            prompt and answer, and, where there are some, reasoning and teacher_reasoning. The last tenth of a file's
            rows is kept for validation and test.
        out: folder of the cell.
        overrides: `dotted.key=value`.
        method: fusion, projector and terms.
        seeds: of the cells.

    Raises:
        ConfigError: a folder without a model, a file without the columns, or fewer rows than a batch.
    """
    preset = _preset(str(data))
    section, count = (preset, None) if preset else _file(Path(data))
    names = _names(teachers)
    values: dict[str, Any] = {
        "title": out.name,
        "seeds": list(seeds),
        "student": "student",
        "models": {name: _model(given) for name, given in {**names, "student": student}.items()},
        "data": section,
        "arms": {
            "control": {"role": "control"},
            ARM: {"base": "control", "role": "experiment", "set": method.arm(list(names))},
        },
        # the student has learnt before; no other cell needs a core
        "train": {"learning_rate": 1e-4, "threads": len(os.sched_getaffinity(0))},
    }
    if len(seeds) > 1:  # of one seed both arms read the same; seeds draw other texts
        values["audit"] = {"allow": ["tokens"]}
    if preset:
        values["train"]["max_length"] = MAX_LENGTH
        task = preset["sources"][0]["task"]
        if PRESETS[task]["evaluate"]["scorer"] == "code":  # which would run what a model wrote
            values["evaluate"] = {"tasks": {task: {"scorer": "none"}}}
    config = parse(values, overridden(overrides), origin="kvpipe train")
    if count is not None and count < config.train.batch_size:
        raise ConfigError(
            f"{data}: {count} rows to train on are fewer than train.batch_size, {config.train.batch_size}; "
            f"give more or --set train.batch_size={count}"
        )
    # what the artefacts are made from: other inputs get another folder
    content = str(data) if preset else digest_of(Path(data), "sha256")
    made_from = digest([content, *map(_place, (*teachers, student))])
    return config, Paths(out / "artefacts" / made_from)


def keep(config: Config, paths: Paths, out: Path) -> None:
    """Write what a trained cell was made by into its folder, where `kvpipe card` and `kvpipe publish` look for it."""
    document = {
        "results": paths.root.relative_to(out).as_posix(),
        "config": config.model_dump(mode="json", exclude_unset=True),
    }
    write_json(out / EXPERIMENT_FILE, document)


def kept(cell: Path, overrides: list[str] | None = None) -> tuple[Config, Paths] | None:
    """The experiment of a cell that was trained without a configuration file; None for every other."""
    path = cell / EXPERIMENT_FILE
    if not path.is_file():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    config = parse(document["config"], overridden(overrides), origin=str(path))
    return config, Paths(cell / document["results"])


def train_direct(
    teachers: Sequence[str | Path],
    student: str | Path,
    data: str | Path,
    out: Path,
    arm: str | None = None,
    seed: int = 0,
    checkpoints: Path | None = None,
    made: bool = False,
    overrides: list[str] | None = None,
    method: Method = Method(),
    compare: bool = False,
    log=print,
) -> None:
    """Train one cell of `experiment` into `out`, which keeps what it was trained by; or, to compare, both arms.

    What will happen is said first; then, once models and data are there, what it will cost; a table is the end. To
    compare, both arms are trained under three seeds from `seed` on (`--set seeds=[…]` for others) and scored, and
    `out/report.html` is the report. Cells that are finished are not made again.
    """
    # torch takes seconds to import, and `kept` is asked without
    from rich import print as show

    from kvpipe.steps.cells import KeptCells, report_cells, run_cells
    from kvpipe.steps.forecast import compared, forecast, trained
    from kvpipe.steps.inputs import Inputs
    from kvpipe.steps.make import make
    from kvpipe.steps.train import make_cell

    seeds = range(seed, seed + 3) if compare else [seed]
    config, paths = experiment(teachers, student, data, out, overrides, method, seeds)
    if any(isinstance(model, HubModel) for model in config.models.values()):
        from kvpipe.models.hub import lock

        config = config.model_copy(update={"lock": lock(config)})
    inputs = Inputs(config, paths)
    cells = inputs.dag.cells if compare else [(arm or ARM, seed)]
    if not made:
        for line in _plan(config, paths, str(data), cells, out):
            log(line)
        make(inputs, [path for step in ("data", "model") for path in inputs.steps[step].files()], log)
        show(forecast(inputs, cells, scored=compare))
    if compare:
        finished = KeptCells(inputs, out / "cells")
        run_cells(finished, cells, scored=True, hours=None, log=log)
        page = Paths(out).report
        report_cells(finished, page, log)
        show(compared(inputs))
        log(f"report: {page}\nstudent: {paths.student(ARM, config.seeds[0])}")
    else:
        make_cell(inputs, arm or ARM, seed, out, checkpoints, made, log)
        keep(config, paths, out)
        show(trained(out))
        log(f"student: {out / STUDENT}, with its card in README.md")


def _plan(config: Config, paths: Paths, data: str, cells: list[tuple[str, int]], out: Path) -> list[str]:
    """What will happen, a line for each step."""
    from kvpipe.models.hub import to_download

    arm, train = config.arm(ARM), config.train
    missing = to_download(config, paths)
    size = f"; {sum(missing.values()) / GB:.2f} GB to download ({', '.join(missing)})" if missing else ""
    terms = ", ".join(f"{name} × {term.weight:g}" for name, term in arm.loss.items())
    fused = f", fused by {arm.fuse.kind}" if len(arm.teachers) > 1 else ""
    count = f"{len(cells)} cells (arm, seed): " if len(cells) > 1 else ""
    threads = f"{train.threads} thread{'' if train.threads == 1 else 's'}"
    return [
        f"teachers {', '.join(arm.teachers)} → student{size}",
        f"data     {data}, split into train, validation and test",
        f"arm      {ARM}: {terms}{fused}; projectors fitted by {arm.fit.method}, then frozen",
        f"training {count}{train.steps} steps of {train.batch_size} examples, {train.precision}, {threads}",
        f"output   {out}",
    ]


def _model(given: str | Path) -> dict[str, Any]:
    """The source of a folder or of a hub id.

    Raises:
        ConfigError: neither.
    """
    path = Path(given)
    if path.is_dir():
        if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
            raise ConfigError(f"{path} is not a model folder: it needs config.json and safetensors")
        return {"source": "local", "path": str(given)}
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(given)):
        raise ConfigError(
            f"{given} is neither a model folder nor a hub id (owner/name): a model folder holds config.json and safetensors"
        )
    return {"source": "hub", "repo": str(given)}


def _place(given: str | Path) -> str:
    return str(Path(given).resolve()) if Path(given).is_dir() else str(given)


def _names(teachers: Sequence[str | Path]) -> dict[str, str | Path]:
    """A name for every teacher: its folder's, with a number where two have the same and no dot, which parts keys in --set."""
    names: dict[str, str | Path] = {}
    for given in teachers:
        base = re.sub(r"[^A-Za-z0-9_-]", "-", Path(_place(given)).name).lstrip("-_") or "teacher"
        name, number = base, 2
        while name in names or name == "student":
            name, number = f"{base}-{number}", number + 1
        names[name] = given
    return names


def _preset(data: str) -> dict[str, Any] | None:
    """The data of a preset; None for a file.

    Raises:
        ConfigError: it is neither.
    """
    known = [name for name, preset in PRESETS.items() if preset["hub"].get("train")]
    found = re.fullmatch(r"(\w+)(\[[^\[\]]*\])?", data)
    if found is None or Path(data).exists():
        return None
    if found[1] not in known:
        raise ConfigError(f"--data {data}: neither a file nor a preset{nearest(found[1], known)}")
    source = {"kind": "hub", "task": found[1], "preset": found[1]}
    source |= {"train": f"train{found[2]}"} if found[2] else {}
    return {"sources": [source], "duplicates": "drop", "leakage": "drop"}


def _file(data: Path) -> tuple[dict[str, Any], int]:
    """The file as data, with the columns that it has, and how many of its rows are to train on."""
    source = {"kind": "files", "task": TASK, **{split: f"{data}{part}" for split, part in PARTS.items()}}
    rows = read_rows(FileData.model_validate({**source, "train": str(data)}), "train").rows
    if len(rows) < FEWEST:
        raise ConfigError(
            f"{data} has {len(rows)} rows; a tenth is kept for validation and test: give {FEWEST} or more"
        )
    has = {name for row in rows for name in row}
    missing = [name for name, needed in FIELDS.items() if needed and name not in has]
    if missing:
        raise ConfigError(f"{data}: no column {', '.join(missing)} (has {', '.join(sorted(has))}); rename the columns")
    count = len(read_rows(FileData.model_validate(source), "train").rows)
    return {"sources": [{**source, "columns": {name: name for name in FIELDS if name in has}}]}, count

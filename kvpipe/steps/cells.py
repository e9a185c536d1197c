"""Finished cells as small text files that can be committed: what a cell leaves survives its machine and its weights.

A cell's folder `<arm>/seed<k>/` holds `history.jsonl`, `cost.json`, `items.csv` (scores, one row per item) and
`made.json`: the settings, the data and the models that it was made from, as digests, and the code's, which is noted and
not compared. While these are what the configuration implies now, the cell counts as done; its files go back to their
places under the results, and statistics and report are made from them without any weights.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from kvpipe.config.section import Section
from kvpipe.experiment.files import read_json, write_json
from kvpipe.experiment.paths import COST, HISTORY, SPLITS, Paths
from kvpipe.experiment.plan import digest
from kvpipe.experiment.provenance import code_hash, git_commit
from kvpipe.models.folders import recorded
from kvpipe.report.render import write_report
from kvpipe.stats.audit import audit
from kvpipe.stats.scores import read_history
from kvpipe.stats.tables import write_arm_table, write_stats
from kvpipe.steps.evaluate import score_folder
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import make
from kvpipe.steps.train import make_cell

ITEMS, MADE = "items.csv", "made.json"
COMPARED = ("settings", "data", "models")
"""What a cell must have been made from to count as done."""
LIMIT = 1_000_000
"""Bytes of a kept cell."""
UNKEPT = ["prediction", "text", "outcome_detail"]
"""Columns of an item's scores that are words."""
ALIKE = 0.02
"""Relative difference in bits per byte of a cell that was computed again: another processor rounds otherwise."""


class KeptCells:
    """The cells of an experiment in a folder.

    Args:
        inputs: the loaders.
        folder: of the kept cells.
    """

    def __init__(self, inputs: Inputs, folder: Path):
        self.inputs, self.folder, self.paths = inputs, folder, inputs.paths

    def folder_of(self, arm: str, seed: int) -> Path:
        """Of one cell."""
        return self.folder / arm / f"seed{seed}"

    def made_from(self, arm: str, scored: bool) -> dict[str, Any]:
        """What decides a cell of an arm and, with `scored`, its scores, as far as it is on this machine; `code` and `commit`
        are noted only."""
        inputs, found = self.inputs, self.inputs.dag.arm(arm)
        config = inputs.config
        settings = {
            "arm": _said(found, {"role", "label"}),
            "train": _said(
                config.train, {"device", "threads", "shard", "checkpoint_every", "hold_targets_gb", "report_to"}
            ),
            "template": _said(config.data.template),
            "evaluate": _said(config.evaluate, {"batch_size"}) if scored else None,
            "store": [config.store.mode, config.store.dtype] if found.teachers else None,
        } | ({"short": _said(config.data.short)} if found.reading == "short" else {})
        splits = {split: self.paths.data(split) for split in SPLITS}
        swap = inputs.dag.arm(config.evaluate.cache_swap).teachers if scored and config.evaluate.cache_swap else []
        models = {name: self.paths.manifest(name) for name in (config.student, *found.teachers, *swap)}
        return {
            "settings": settings,
            "data": {split: _content(inputs, split) for split, path in splits.items() if path.is_file()},
            "models": {name: _weights(path.parent) for name, path in models.items() if path.is_file()},
            "code": code_hash("kvpipe.steps.train"),
            "commit": git_commit(),
        }

    def differs(self, arm: str, seed: int) -> list[str] | None:
        """What a kept cell was made from otherwise than now; empty: it is done, None: it is not there.

        Data and models that are not on this machine are not compared.
        """
        path = self.folder_of(arm, seed) / MADE
        if not path.is_file():
            return None
        before = read_json(path, "remove the folder and run the cell again")
        now = self.made_from(arm, (path.parent / ITEMS).is_file())
        if before["settings"] != json.loads(json.dumps(now["settings"])):
            return ["settings"]
        pairs = ((kind, name, value) for kind in COMPARED[1:] for name, value in now[kind].items())
        return [f"{kind}: {name}" for kind, name, value in pairs if before[kind].get(name) != value]

    def keep(self, arm: str, seed: int) -> None:
        """Write a finished cell's files.

        Raises:
            ValueError: they are larger than a commit should be.
        """
        out, paths = self.folder_of(arm, seed), self.paths
        out.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(paths.history(arm, seed), out / HISTORY)
        cost = read_json(paths.cost(arm, seed), "train the cell again")
        cost.get("provenance", {}).pop("host", None)  # of no use elsewhere
        write_json(out / COST, cost)
        made = self.made_from(arm, paths.items(arm, seed).is_file())
        if paths.items(arm, seed).is_file():
            items = pd.read_parquet(paths.items(arm, seed))
            items.drop(columns=UNKEPT, errors="ignore").to_csv(out / ITEMS, index=False)
            made["items"] = items.attrs
        write_json(out / MADE, made, sort_keys=True)
        if (size := sum(path.stat().st_size for path in out.iterdir())) > LIMIT:
            raise ValueError(f"{out} has {size:,} bytes, a kept cell at most {LIMIT:,}: raise train.log_every")

    def restore(self, arm: str, seed: int) -> None:
        """Put a kept cell's files where the statistics read them."""
        kept, paths = self.folder_of(arm, seed), self.paths
        paths.cell(arm, seed).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept / HISTORY, paths.history(arm, seed))
        shutil.copyfile(kept / COST, paths.cost(arm, seed))
        if (kept / ITEMS).is_file():
            paths.items(arm, seed).parent.mkdir(parents=True, exist_ok=True)
            items = pd.read_csv(kept / ITEMS).assign(text=None, prediction=None)
            if items.correct.isna().all():
                items["correct"] = None
            items.attrs = read_json(kept / MADE, "")["items"]
            items.to_parquet(paths.items(arm, seed), index=False)


def run_cells(kept: KeptCells, cells: Iterable[tuple[str, int]], scored: bool, hours: float | None, log=print) -> int:
    """Make cells that are not kept yet, one after the other, and keep each once it is finished; gives how many are left.

    Args:
        kept: where to.
        cells: (arm, seed), in the order in which they are made.
        scored: score the test split too; without it a cell is its training and validation losses.
        hours: no cell begins after so many.
        log: takes lines for people.
    """
    inputs, begun, left = kept.inputs, time.monotonic(), 0
    make(inputs, [path for name in ("data", "model") for path in inputs.steps[name].files()], log)
    for arm, seed in cells:
        differs = kept.differs(arm, seed)
        there = differs == [] and (not scored or (kept.folder_of(arm, seed) / ITEMS).is_file())
        if there:
            kept.restore(arm, seed)
            continue
        if hours is not None and time.monotonic() - begun > 3600 * hours:
            left += 1
            continue
        log(f"{arm}, seed {seed} …" + (f" (again: changed since it was made: {', '.join(differs)})" if differs else ""))
        if not inputs.paths.student(arm, seed).is_dir() or differs != []:
            make_cell(inputs, arm, seed, log=log)
        keep_cell(kept, arm, seed, scored, log)
    return left


def keep_cell(kept: KeptCells, arm: str, seed: int, scored: bool, log=print) -> None:
    """Keep a trained cell, with `scored` after its test split is scored."""
    inputs = kept.inputs
    if scored:
        remade = {path for step in inputs.steps.values() if step.remade for path in step.files()}
        needs = inputs.steps["evaluate"].needs(arm=arm, seed=str(seed))
        make(inputs, [path for path in needs if path in remade], log)
        log(score_folder(inputs, inputs.paths.student(arm, seed), "test", inputs.paths.items(arm, seed)))
    kept.keep(arm, seed)


def report_cells(kept: KeptCells, out: Path, log=print) -> None:
    """Statistics and report of the cells that are kept, from their files alone."""
    inputs, paths = kept.inputs, kept.paths
    for arm, seed in inputs.dag.cells:
        if kept.differs(arm, seed) == []:
            kept.restore(arm, seed)
    done = [arm for arm in inputs.dag.arms if all(paths.items(arm, seed).is_file() for seed in inputs.config.seeds)]
    for arm in done:
        write_arm_table(inputs.dag, paths, arm)
    if paths.data("test").is_file():
        for found in audit(inputs.config, paths, paths.audit):
            log(f"{found.status:>8}  {found.name}: {found.detail}")
    write_stats(inputs.dag, paths, paths.untrained if paths.untrained.is_file() else None)
    write_report(inputs.config, paths, out)


def check_cell(kept: KeptCells, results: Path, drawn: int | None = None, log=print) -> bool:
    """Make one kept cell, drawn at random, again under other results, and compare; gives whether it came out alike.

    Args:
        kept: the cells.
        results: where everything that the cell needs is made anew.
        drawn: seed of the draw.
        log: takes lines for people.

    Raises:
        FileNotFoundError: no cell is kept that counts as done.
    """
    cells = [cell for cell in kept.inputs.dag.cells if kept.differs(*cell) == []]
    if not cells:
        raise FileNotFoundError(f"{kept.folder} has no cell that counts as done: run the cells first")
    arm, seed = random.Random(drawn).choice(cells)
    again = KeptCells(Inputs(kept.inputs.config, Paths(results)), results / "cells")
    scored = (kept.folder_of(arm, seed) / ITEMS).is_file()
    log(f"{arm}, seed {seed}, drawn of {len(cells)}")
    run_cells(again, [(arm, seed)], scored, None, log)
    kept.restore(arm, seed)
    alike = True
    for name, before, now in zip(
        ("validation loss", "bits per byte"), _numbers(kept, arm, seed), _numbers(again, arm, seed), strict=False
    ):
        difference = abs(now / before - 1)
        alike &= difference <= ALIKE
        log(f"{name}: {before:.5f} kept, {now:.5f} now ({difference:.2%}; {ALIKE:.0%} is allowed)")
    return alike


def _numbers(cells: KeptCells, arm: str, seed: int) -> list[float]:
    """The last validation loss; and where it is scored, nats per byte of the test split."""
    history = read_history(cells.paths, arm, seed)
    assert history is not None
    found = [float(history[1].validation_loss.iloc[-1])]
    if cells.paths.items(arm, seed).is_file():
        items = pd.read_parquet(cells.paths.items(arm, seed))
        found.append(float(items.nll.sum() / items.bytes.sum()))
    return found


def _said(section: Section, exclude: set[str] | None = None) -> dict[str, Any]:
    """The settings that are not at their default: a key that comes new does not make finished cells unfinished."""
    return section.model_dump(exclude=exclude, exclude_defaults=True)


def _content(inputs: Inputs, split: str) -> str:
    """Of the records, whatever the file's format."""
    return digest([asdict(record) for record in inputs.records(split)], 16)


def _weights(folder: Path) -> str:
    """Of a model's weights and tokenizer; its config names the version of the package that wrote it."""
    files = recorded(folder)["files"]
    return digest(
        {name: files[name] for name in files if name.endswith(".safetensors") or name == "tokenizer.json"}, 16
    )

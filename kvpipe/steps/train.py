"""Train step: one cell, in its folder."""

from __future__ import annotations

from pathlib import Path

from kvpipe.distill.build import Workspace
from kvpipe.steps.prepare import prepare
from kvpipe.train.trainer import check_settings, train


def make_cell(
    work: Workspace, arm: str, seed: int, out: Path | None, checkpoints: Path | None, made: bool = False, log=print
) -> Path:
    """Train one cell; returns its folder.

    Args:
        work: the loaders.
        arm: the arm's name.
        seed: of the cell.
        out: its folder; the results' own by default.
        checkpoints: their folder; by default beside `out`, or the results' own.
        made: everything that the cell needs is there already; else it is made first where it is missing or stale.
        log: takes lines for people.
    """
    check_settings(work.config.train, log=lambda *_: None)  # its notes come when the cell begins
    if not made:
        prepare(work, arm, log)
    folder = out or work.paths.cell(arm, seed)
    kept = checkpoints or (folder.with_name(folder.name + ".checkpoints") if out else work.paths.checkpoints(arm, seed))
    train(work, arm, seed, folder, kept, log=log)
    return folder

"""What the whole grid will cost, measured on a small copy of it, and how hard each term of each arm pulls.

The copy runs every step that an arm needs; what a step took is scaled by how much more the grid reads. Artefacts of the
experiment itself, models, splits and tokens, are made where they are missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import Any

from kvpipe.config import Config
from kvpipe.doctor.memory import needs
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.preflight.copy import Copied, make_copy, smaller
from kvpipe.preflight.costs import Preflight, Scaling, term_pulls
from kvpipe.preflight.measure import Measured, apart, measure_cell, measure_job, measure_scoring


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

"""What would fail, said before the first job starts, with the fix. No torch: the checks take seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding
from kvpipe.doctor.gpu import check_gpu
from kvpipe.doctor.memory import check_memory
from kvpipe.doctor.settings import check_arms, check_packages, check_sandbox
from kvpipe.doctor.sources import check_sources
from kvpipe.doctor.storage import check_storage
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.launch import in_job

__all__ = ["FAIL", "OK", "WARNING", "Finding", "Workload", "as_json", "examine", "probe", "show"]

_Check = Callable[[Workload], Iterator[Finding]]
CHECKS: dict[str, _Check] = {
    "packages": check_packages,
    "gpu": check_gpu,
    "sources": check_sources,
    "arms": check_arms,
    "storage": check_storage,
    "memory": check_memory,
    "sandbox": check_sandbox,
}
"""Of the experiment, and of this machine as the one where it runs."""
EXTRAS = "kvpipe.doctor"
"""Group of entry points. Each is a module with `CHECKS`, which are added to those above or replace one of the same name,
and `probe(work, log)`: plugins/cluster has what a cluster's jobs need."""
INSTALL = "pip install -e plugins/cluster   (make install and make login do)"


def extras() -> list[Any]:
    """The modules that are installed as extras."""
    return [entry.load() for entry in entry_points(group=EXTRAS)]


def examine(work: Workload) -> list[Finding]:
    """Every check that takes seconds and starts no job."""
    work.paths.root.mkdir(parents=True, exist_ok=True)
    checks, more = dict(CHECKS), extras()
    for extra in more:
        checks |= extra.CHECKS
    found = [finding for check in checks.values() for finding in check(work)]
    if work.profile is not None and not more and not in_job():
        detail = (
            f"the cluster, the image and what {work.profile} asks for are not checked: kvpipe-cluster is not installed"
        )
        found.append(Finding("profile", WARNING, detail, INSTALL))
    return found


def probe(work: Workload, log: Callable[[str], None]) -> Path:
    """Run a short job on the cluster; the profile that follows, below the results.

    Raises:
        ModuleNotFoundError: no extra that can is installed.
        RuntimeError: the cluster took no job.
    """
    for extra in extras():
        return extra.probe(work, log)
    raise ModuleNotFoundError(f"--probe needs kvpipe-cluster, which is not installed: {INSTALL}")


def show(findings: list[Finding]) -> str:
    """For people: one line per finding, the fix below it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:>10}  {finding.name}: {finding.detail}")
        if finding.fix:
            lines.append(f"{'':>10}  → {finding.fix}")
    counts = {status: sum(f.status == status for f in findings) for status in (OK, WARNING, FAIL)}
    return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items())])


def as_json(findings: list[Finding]) -> str:
    """The findings as one JSON document."""
    return json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2)

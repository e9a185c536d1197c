"""What would fail, said before the first job starts, with the fix. No torch: the checks take seconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from kvpipe.config import Config
from kvpipe.doctor.arms import examine_arms
from kvpipe.doctor.asked import Asked, read_profile
from kvpipe.doctor.container import examine_container
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding
from kvpipe.doctor.gpu import examine_gpu
from kvpipe.doctor.memory import examine_memory
from kvpipe.doctor.slurm import examine_slurm
from kvpipe.doctor.sources import examine_sources
from kvpipe.doctor.storage import examine_storage
from kvpipe.doctor.versions import examine_versions
from kvpipe.doctor.walls import examine_walls
from kvpipe.experiment.paths import Paths

__all__ = ["FAIL", "OK", "WARNING", "Finding", "examine", "read_profile", "show", "write"]


def examine(config: Config, paths: Paths, asked: Asked | None = None) -> list[Finding]:
    """Every check that takes seconds and starts no job.

    Args:
        config: the experiment.
        paths: where its results are or will be.
        asked: the Snakemake profile of a cluster; only the rules' own resources without one.
    """
    asked = asked or Asked(None)
    paths.root.mkdir(parents=True, exist_ok=True)
    return [
        *examine_versions(config, asked),
        *examine_slurm(asked),
        *examine_container(config, paths, asked),
        *examine_gpu(config, paths, asked),
        *examine_sources(config, paths),
        *examine_arms(config, paths),
        *examine_storage(config, paths),
        *examine_memory(config, paths, asked),
        *examine_walls(config, asked),
    ]


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
    return json.dumps({"findings": [asdict(f) for f in findings]}, indent=2)


def write(findings: list[Finding], out: Path) -> None:
    """The findings as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_json(findings) + "\n", encoding="utf-8")

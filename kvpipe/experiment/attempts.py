"""Cost of a cell over all its attempts, killed ones included: a few lines beside its checkpoints.

Each attempt appends its age and peak memory now and then; the last line of a killed one is its cost, up to the steps
between two lines. Slurm's accounting needs a database that many sites do not have.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

SUFFIX = ".attempts.jsonl"


def record_of(checkpoints: Path) -> Path:
    """The record that belongs to a folder of checkpoints."""
    return checkpoints.with_name(checkpoints.name + SUFFIX)


class Attempt:
    """This process's part of the record."""

    first = True
    """Of the cells that this process trains, one after the other."""

    def __init__(self, checkpoints: Path, device: str, processes: int):
        self.file = record_of(checkpoints)
        # from the beginning of the process: loading models occupies a GPU as well
        self.start = psutil.Process().create_time() if Attempt.first else time.time()
        Attempt.first = False
        self.fixed = {"attempt": f"{os.getpid()}@{self.start:.2f}", "device": device, "processes": processes}

    def note(self, peak_memory: int) -> None:
        """Write this attempt's age (seconds) and peak memory (bytes)."""
        line = {**self.fixed, "seconds": round(time.time() - self.start, 2), "peak_memory_bytes": peak_memory}
        with suppress(OSError):  # a full disk stops the checkpoint, which says so; not the bookkeeping
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")


def total(file: Path) -> dict[str, Any] | None:
    """Sum over the attempts in a record: `attempts`, `wall_seconds`, `gpu_seconds`, `peak_memory_bytes`; None without one."""
    last: dict[str, dict[str, Any]] = {}
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with suppress(ValueError):  # a line that a kill cut off
            line = json.loads(text)
            last[line["attempt"]] = line
    if not last:
        return None
    gpus = {name: line["processes"] * line["device"].startswith("cuda") for name, line in last.items()}
    return {
        "attempts": len(last),
        "wall_seconds": round(sum(line["seconds"] for line in last.values()), 2),
        "gpu_seconds": round(sum(line["seconds"] * gpus[name] for name, line in last.items()), 2),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in last.values()),
    }

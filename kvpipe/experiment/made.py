"""What every artefact was made from, kept in `made/`: a step whose settings, code and inputs are the same is not run again.

For use without Snakemake, which keeps a record of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvpipe.experiment.files import content_digest, write_json
from kvpipe.experiment.provenance import code_hash
from kvpipe.experiment.steps import Step


def note(step: Step, **job: str) -> None:
    """Keep what the artefact that was made just now depends on."""
    write_json(_record(step, job), _origin(step, job))


def changed(step: Step, **job: str) -> list[str] | None:
    """What is not as it was when a job was done; empty: nothing, None: a file is not there, or nobody knows."""
    record = _record(step, job)
    if not all(path.is_file() for path in (record, *step.makes(**job).values())):
        return None
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        now = _origin(step, job)
        return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    except (OSError, ValueError, AttributeError):  # an input is gone, or the record is damaged
        return None


def _record(step: Step, job: dict[str, str]) -> Path:
    return step.paths.made(next(iter(step.makes(**job).values())))


def _name(path: Path, root: Path) -> str:
    """Of a file below the results as seen from there: they may be moved, and be given by a path of another form."""
    whole, above = path.resolve(), root.resolve()
    return str(whole.relative_to(above) if whole.is_relative_to(above) else path)


def _origin(step: Step, job: dict[str, str]) -> dict[str, Any]:
    files = (*step.needs(**job), *step.sources(**job))
    inputs = {_name(path, step.paths.root): content_digest(path) for path in files}
    return {"settings": json.loads(step.depends(**job)), "code": code_hash(step.hashed), **inputs}

"""A finding, and how the doctor asks other programs: every question has a time limit."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

OK, WARNING, FAIL = "ok", "warning", "would fail"
PATIENCE = 15.0
"""Seconds that a program has for its answer."""


@dataclass(frozen=True)
class Finding:
    """One check: `ok`, `warning` or `would fail`, and what to do."""

    name: str
    status: str
    detail: str
    fix: str = ""


Answer = subprocess.CompletedProcess[str]


def ask(*command: str, patience: float | None = None, stdin: str | None = None) -> Answer:
    """Run a program; exit status 127 where it is not on the PATH, 124 where it does not answer in time."""
    if shutil.which(command[0]) is None:
        return Answer(command, 127, "", f"{command[0]} is not on the PATH")
    limit = PATIENCE if patience is None else patience
    try:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace", timeout=limit)
    except subprocess.TimeoutExpired:
        return Answer(command, 124, "", f"{command[0]} gave no answer within {limit:g} s")
    except OSError as error:  # not executable, wrong architecture, DOS line ends behind #!
        return Answer(command, 126, "", str(error))


def last_line(answer: Answer) -> str:
    """The last line of a program's complaint, or of its output."""
    lines = (answer.stderr.strip() or answer.stdout.strip()).splitlines()
    return lines[-1].strip() if lines else f"exit status {answer.returncode}, no message"

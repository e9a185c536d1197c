"""One case of bad input: a copy of a small finished experiment with one thing wrong, and a command on it, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import yaml

from kvpipe.cli import app
from kvpipe.config.section import assign
from kvpipe.data import patterns
from kvpipe.stats.audit import audit
from kvpipe.stats.tables import write_arm_table, write_stats
from kvpipe.steps.evaluate import score_folder, score_untrained
from kvpipe.steps.train import make_cell

HINT = "(set KVPIPE_TRACEBACK=1 for the traceback)"
ARMS = {
    "control": {"role": "control"},
    "one": {
        "base": "control",
        "role": "experiment",
        "set": {"teachers": ["alpha"], "loss": {"keys": {}, "values": {}}, "layer": {"kind": "cka", "k": 2}},
    },
}
SETTINGS: dict[str, Any] = {"seeds": [0], "arms": ARMS, "train.steps": 2, "train.checkpoint_every": 1}
LOST = ("made/", "logs/")
"""Below results/, what a command may write anew or remove."""


@dataclass(frozen=True)
class Case:
    """What is wrong, what is run, and what must be said of it."""

    what: str
    says: str
    """Regular expression that the message matches: where, what was expected, what to do."""
    command: str = "status"
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted key → value, changed in the configuration file."""
    arm: dict[str, Any] | None = None
    """Settings of an arm `x` that is built on `one`."""
    do: Callable[[], object] | None = None
    """Changes files; the working directory is the experiment's."""
    environment: dict[str, str] = field(default_factory=dict)
    makes: tuple[str, ...] = ()
    """Below results/, what the command is to make anew, and so may replace."""


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    status: int
    message: str
    printed: str
    lost: tuple[str, ...]
    """Files below results/ that were there before and are gone or other ones."""


def build(folder: Path) -> None:
    """The experiment: data, models, stores, a layer map, projectors, two cells, their scores and tables. Its paths are
    relative to its folder."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        work = tiny.build(Path(), SETTINGS)
        values = work.config.model_dump(mode="json", exclude_unset=True)
        Path("config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        for arm in ("control", "one"):
            make_cell(work, arm, 0, log=lambda line: None)
            score_folder(work, work.paths.student(arm, 0), "test", work.paths.items(arm, 0))
            write_arm_table(work.dag, work.paths, arm)
        score_untrained(work, work.paths.untrained)
        write_stats(work.dag, work.paths, work.paths.untrained)
        audit(work.config, work.paths, work.paths.audit)


def contents(folder: Path) -> dict[str, str]:
    """File below a folder → hash of its content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def outcome(case: Case, base: Path, folder: Path) -> Outcome:
    """Run a case in `folder`, a copy of `base` that goes afterwards."""
    shutil.copytree(base, folder, symlinks=True)
    said, printed = io.StringIO(), io.StringIO()
    environment = {"KVPIPE_TRACEBACK": "", "KVPIPE_CONFIG": "config.yaml", **case.environment}
    arguments = ["kvpipe", *shlex.split(case.command)]
    with contextlib.chdir(folder):
        changed(case)
        before = contents(Path("results"))
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(printed),
            mock.patch.dict(os.environ, environment),
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(patterns, "LIMIT_SECONDS", 0.2),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                app.main()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
        after = contents(Path("results"))
    shutil.rmtree(folder)
    lost = sorted(name for name, content in before.items() if after.get(name) != content)
    kept = (*LOST, *case.makes)
    line = message(said.getvalue(), folder)
    if case.command == "doctor" and not line:  # which prints its findings
        line = "\n".join(text.strip() for text in printed.getvalue().splitlines() if "would fail  " in text)
    return Outcome(status, line, printed.getvalue(), tuple(name for name in lost if not name.startswith(kept)))


def changed(case: Case) -> None:
    """Bring what is wrong about."""
    path = Path("config.yaml")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for dotted, value in case.set.items():
        assign(values, dotted, value)
    if case.arm is not None:
        values["arms"]["x"] = {"base": "one", "set": case.arm}
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if case.do is not None:
        case.do()


def message(said: str, folder: Path) -> str:
    """What stood on stderr: without the hint, and without the frame that a usage error stands in."""
    lines = [line.strip("│ ").rstrip() for line in said.replace(f"{folder}/", "").splitlines()]
    lines = [line for line in lines if line and line != HINT and line[0] not in "╭╰"]
    if lines and lines[0].startswith("Usage:"):
        lines = [" ".join(line for line in lines if not line.startswith(("Usage:", "Try ")))]
    return "\n".join(lines)

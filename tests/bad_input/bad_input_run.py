"""One case of bad input: a copy of a small finished experiment with one thing wrong, and a command on it, in this process."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import typer.main
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
SETTINGS: dict[str, Any] = {
    "seeds": [0],
    "arms": ARMS,
    "train.steps": 2,
    "train.checkpoint_every": 1,
    "store.shards": 2,
}
COMMANDS = typer.main.get_command(app.app)
"""Made once: typer reads all signatures anew for every call."""
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
    goes_on: bool = False
    """It ends well, and says on standard output what it does about it."""


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    status: int
    message: str
    printed: str
    lost: tuple[str, ...]
    """Files below results/ that were there before and are gone or other ones."""


def build(folder: Path) -> None:
    """The experiment: data, models, stores, a layer map, projectors, two cells with their checkpoints, scores and tables.
    Its paths are relative to its folder."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        work = tiny.build(Path(), SETTINGS)
        values = work.config.model_dump(mode="json", exclude_unset=True)
        Path("config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        for arm in ("control", "one"):
            with mock.patch.object(shutil, "rmtree"):  # which a finished cell's checkpoints end by
                make_cell(work, arm, 0, log=lambda line: None)
            score_folder(work, work.paths.student(arm, 0), "test", work.paths.items(arm, 0))
            write_arm_table(work.dag, work.paths, arm)
        score_untrained(work, work.paths.untrained)
        write_stats(work.dag, work.paths, work.paths.untrained)
        audit(work.config, work.paths, work.paths.audit)


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Path below a folder → what tells that a file there is another one: its mode, size and time; of a folder nothing."""
    found = {}
    for path in folder.rglob("*"):
        is_folder = path.is_dir() and not path.is_symlink()
        entry = path.lstat()
        found[path.relative_to(folder).as_posix()] = (
            (0, 0, 0) if is_folder else (entry.st_mode, entry.st_size, entry.st_mtime_ns)
        )
    return found


def restore(base: Path, folder: Path) -> None:
    """Make `folder` the copy of `base` that it was: only what differs is copied, hundreds of cases share one folder."""
    folder.mkdir(exist_ok=True)
    wanted, found = state(base), state(folder)
    for name in sorted(found, reverse=True):
        if found[name] != wanted.get(name):
            path = folder / name
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            del found[name]
    for name in sorted(wanted.keys() - found.keys()):
        (folder / name).mkdir() if wanted[name] == (0, 0, 0) else shutil.copy2(base / name, folder / name)


def outcome(case: Case, base: Path, folder: Path) -> Outcome:
    """Run a case in `folder`, which becomes a copy of `base` before."""
    restore(base, folder)
    said, printed = io.StringIO(), io.StringIO()
    environment = {"KVPIPE_TRACEBACK": "", "KVPIPE_CONFIG": "config.yaml", **case.environment}
    arguments = ["kvpipe", *shlex.split(case.command)]
    with contextlib.chdir(folder):
        changed(case)
        before, original = state(Path("results")), state(base / "results")
        content = {name: _content(Path("results", name)) for name in before if before[name] != original.get(name)}
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(printed),
            mock.patch.dict(os.environ, environment),
            mock.patch.object(sys, "argv", arguments),
            mock.patch.object(patterns, "LIMIT_SECONDS", 0.2),
            mock.patch.object(typer.main, "get_command", lambda _: COMMANDS),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            try:
                app.main()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
        after = state(Path("results"))
        lost = sorted(
            name
            for name, found in before.items()
            if after.get(name) != found
            and not name.endswith(".partial")
            and (
                name not in after
                or _content(Path("results", name)) != content.get(name, _content(base / "results" / name))
            )
        )
    kept = (*LOST, *case.makes)
    line = message(said.getvalue(), folder)
    if case.command == "doctor" and not line:  # which prints its findings
        line = "\n".join(text.strip() for text in printed.getvalue().splitlines() if "would fail  " in text)
    if case.goes_on:
        line = "\n".join(text for text in printed.getvalue().splitlines() if re.search(case.says, text))
    return Outcome(status, line, printed.getvalue(), tuple(name for name in lost if not name.startswith(kept)))


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def changed(case: Case) -> None:
    """Bring what is wrong about."""
    path = Path("config.yaml")
    if case.set or case.arm is not None:
        values = yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        for dotted, value in case.set.items():
            assign(values, dotted, value)
        if case.arm is not None:
            values["arms"]["x"] = {"base": "one", "set": case.arm}
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        path.write_text(yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
    if case.do is not None:
        case.do()


def message(said: str, folder: Path) -> str:
    """What stood on stderr: without the hint, and without the frame that a usage error stands in."""
    lines = [line.strip("│ ").rstrip() for line in said.replace(f"{folder}/", "").splitlines()]
    lines = [line for line in lines if line and line != HINT and line[0] not in "╭╰"]
    if lines and lines[0].startswith("Usage:"):
        lines = [" ".join(line for line in lines if not line.startswith(("Usage:", "Try ")))]
    return "\n".join(lines)

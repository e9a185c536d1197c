"""Cells of the tiny experiment in several processes (gloo, CPU): `together` starts this file once for each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from tiny import config
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kvpipe.experiment.paths import Paths
from kvpipe.steps import train as step
from kvpipe.steps.inputs import Inputs

FORKED = str(Path(__file__).with_name("forked.py"))


def cells(folder: Path, out: Path, overrides: dict[str, Any], arms: list[str], double: bool) -> None:
    """Train cells of the experiment in `folder`; every optimizer step's gradients are kept beside each cell.

    With `double`, the student and all that trains or is computed beside it are in float64.
    """
    work = Inputs(config(folder, overrides), Paths(folder / "results"))
    loaded = step.load_objective
    if double:
        student = Inputs.student
        work.student = lambda *args: student(work, *args).double()  # type: ignore[method-assign]
        step.load_objective = lambda *args: loaded(*args).double()  # type: ignore[union-attr]
    try:
        _train(work, out, arms)
    finally:
        step.load_objective = loaded


def _train(work: Inputs, out: Path, arms: list[str]) -> None:
    for arm in arms:
        steps: list[list[torch.Tensor]] = []

        def keep(optimizer, *_, steps=steps):
            found = [p.grad for group in optimizer.param_groups for p in group["params"]]
            # of a sharded student there are parts only
            steps.append([g.clone() for g in found if g is not None and not hasattr(g, "full_tensor")])

        hook = register_optimizer_step_pre_hook(keep)
        try:
            step.train_cell(work, arm, 0, out / arm, out / f"{arm}.checkpoints", log=lambda *_: None)
        finally:
            hook.remove()
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(steps, out / arm / "gradients.pt")


@cache
def environment() -> dict[str, str]:
    """Of the processes: the zoos of the tests are found, and the server that forks them, which ends with this process."""
    address = str(Path(mkdtemp(prefix="kvpipe-")) / "socket")
    found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "KVPIPE_SERVER": address}
    lives, _ = os.pipe()
    quiet = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
    command = [sys.executable, FORKED, "serve", address]
    subprocess.Popen(command, stdin=lives, env=found | quiet, start_new_session=True)
    os.close(lives)
    while not Path(address).exists():
        time.sleep(0.01)
    return found


def together(number: int, script: str, *arguments: Any, **variables: str) -> list[subprocess.CompletedProcess]:
    """Run a script in so many processes that know of each other; one is no group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    started = [
        subprocess.Popen(
            [sys.executable, FORKED, script, *map(str, arguments)],
            env=environment()
            | variables
            | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if number > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    done = []
    for process in started:
        out, err = process.communicate(timeout=300)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    cells(Path(given["folder"]), Path(given["out"]), given["overrides"], given["arms"], given["double"])

"""`make torture`: a real `kvpipe train` process is killed at a random moment and run again, 20 times; nothing may differ.

Weights, history and per-item metrics of every resumed run are compared byte by byte with those of a run that was left alone.
The moment is drawn over the whole life of the process: while it starts, trains, writes a checkpoint or its results. The seed is
printed; `--seed` repeats it. Half of the kills are SIGKILL, the others SIGTERM, SIGUSR1 and SIGINT.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TASK = "{{kind: embedded, task: {task}, train: 240, validation: 20, test: 20, difficulty: 2}}"
SETTINGS = [
    f"data.sources=[{TASK.format(task='math')}, {TASK.format(task='code')}]",
    "train.steps=120",
    "train.checkpoint_every=7",
    "train.eval_every=20",
    "train.log_every=5",
]
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
COMPARED = ("out/model/model.safetensors", "out/history.jsonl", "items.parquet")


def kvpipe(*arguments: str, log: Path, wait: float | None = None, number: int = 0) -> int:
    """Run a subcommand in a process of its own; with `wait` it gets a signal after so many seconds."""
    command = [sys.executable, "-m", "kvpipe", *arguments]
    with log.open("a") as handle:
        process = subprocess.Popen(command, cwd=ROOT, stdout=handle, stderr=subprocess.STDOUT)
        try:
            return process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            return process.wait(timeout=3600)


def cell(folder: Path, results: Path, arm: str, wait: float | None = None, number: int = 0) -> int:
    """One attempt at the cell."""
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    where = ["--results", str(results), "--out", str(folder / "out"), "--checkpoints", str(folder / "checkpoints")]
    return kvpipe("train", "--arm", arm, "--seed", "0", *where, *sets, log=folder / "log", wait=wait, number=number)


def score(folder: Path, results: Path) -> None:
    """The cell's per-item metrics."""
    items = ["--model", str(folder / "out" / "model"), "--out", str(folder / "items.parquet")]
    done = kvpipe("evaluate", "--results", str(results), *items, log=folder / "log")
    assert done == 0, (folder / "log").read_text()


def resumed_after(log: Path) -> str:
    """The step that the last attempt went on from."""
    found = re.findall(r"continuing after step (\d+)", log.read_text())
    return found[-1] if found else "start"


def main() -> int:
    """Torture a cell; exit status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--arm", default="full")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--results", type=Path, help="finished artefacts; made in a temporary folder otherwise")
    options = parser.parse_args()
    choice = random.Random(options.seed)
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    results, whole = options.results or root / "results", root / "whole"
    whole.mkdir()
    # twice: the first run makes the artefacts as well, the second's duration is what kills are drawn from
    assert cell(whole, results, options.arm) == 0, (whole / "log").read_text()
    shutil.rmtree(whole / "out")
    begun = time.monotonic()
    assert cell(whole, results, options.arm) == 0, (whole / "log").read_text()
    life = time.monotonic() - begun
    score(whole, results)
    print(f"arm {options.arm}, {', '.join(SETTINGS[1:])}; a run left alone takes {life:.1f} s; --seed {options.seed}\n")
    print("| kill | signal | after | exit status | went on from step | restarts | differing |")
    print("|---|---|---|---|---|---|---|")
    differing = 0
    for number in range(1, options.kills + 1):
        folder = root / f"kill{number}"
        folder.mkdir()
        sent, moment = choice.choice(SIGNALS), choice.uniform(0.05, 1.0) * life
        while (status := cell(folder, results, options.arm, moment, sent)) == 0:
            moment *= 0.8  # it was done before the signal came: that is no kill
            shutil.rmtree(folder)
            folder.mkdir()
        assert cell(folder, results, options.arm) == 0, (folder / "log").read_text()
        score(folder, results)
        wrong = [name for name in COMPARED if (folder / name).read_bytes() != (whole / name).read_bytes()]
        differing += bool(wrong)
        restarts = json.loads((folder / "out" / "cost.json").read_text())["restarts"]
        row = [number, sent.name, f"{moment:.1f} s", status, resumed_after(folder / "log"), restarts]
        print(f"| {' | '.join(map(str, row))} | {', '.join(wrong) or 'nothing'} |", flush=True)
        if not wrong:
            shutil.rmtree(folder)
    print(f"\n{options.kills - differing} of {options.kills} identical bit by bit")
    if not differing:
        shutil.rmtree(root)
    return int(differing > 0)


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.exit(main())

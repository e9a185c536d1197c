"""`make torture`: a real `kvpipe train` process is killed at a random moment and run again, 20 times; nothing may differ.

Weights, history and per-item metrics of every resumed run are compared byte by byte with those of a run that was left alone.
Three kills in four arrive while it trains, at a moment drawn over the time from its first line to its end (in a step, in a
checkpoint, in the writing of the results); the others while it starts. Half are SIGKILL, the others SIGTERM, SIGUSR1 and SIGINT.
The seed is printed; `--seed` repeats the draw.
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
    "train.steps=100",
    "train.checkpoint_every=7",
    "train.eval_every=20",
    "train.log_every=5",
]
SIGNALS = [signal.SIGKILL] * 3 + [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
COMPARED = ("out/model/model.safetensors", "out/history.jsonl", "items.parquet")
BEGUN = re.compile(r"^(step 0/|continuing after)", re.MULTILINE)
PATIENCE = 3600
SCORE = """
import sys
from pathlib import Path
from kvpipe.cli.use import evaluate
for folder in map(Path, sys.argv[2:]):
    evaluate(model=folder / "out" / "model", out=folder / "items.parquet", results=Path(sys.argv[1]))
"""


class Cell:
    """One cell's folder, and attempts at it."""

    def __init__(self, folder: Path, results: Path, arm: str):
        self.folder, self.log = folder, folder / "log"
        folder.mkdir()
        sets = [part for setting in SETTINGS for part in ("--set", setting)]
        where = ["--results", str(results), "--out", str(folder / "out"), "--checkpoints", str(folder / "checkpoints")]
        self.command = [sys.executable, "-m", "kvpipe", "train", "--arm", arm, "--seed", "0", *where, *sets]

    def start(self) -> subprocess.Popen:
        """A process that begins, or goes on."""
        with self.log.open("w") as handle:
            return subprocess.Popen(self.command, cwd=ROOT, stdout=handle, stderr=subprocess.STDOUT)

    def begun(self, process: subprocess.Popen) -> None:
        """Wait for the first line of training."""
        end = time.monotonic() + PATIENCE
        while process.poll() is None and not BEGUN.search(self.log.read_text()):
            assert time.monotonic() < end, f"no training within {PATIENCE} s:\n{self.log.read_text()}"
            time.sleep(0.02)

    def finish(self) -> tuple[float, float]:
        """Run it to its end: seconds until its first line, and from there."""
        began = time.monotonic()
        process = self.start()
        self.begun(process)
        trains = time.monotonic()
        assert process.wait(timeout=PATIENCE) == 0, self.log.read_text()
        return trains - began, time.monotonic() - trains

    def kill(self, number: int, starting: bool, delay: float) -> int:
        """Run it until a signal, some seconds after its start or its first line; the exit status."""
        process = self.start()
        if not starting:
            self.begun(process)
        try:
            return process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            return process.wait(timeout=PATIENCE)

    @property
    def resumed(self) -> str:
        """The step that the last attempt went on from."""
        found = re.findall(r"continuing after step (\d+)", self.log.read_text())
        return found[-1] if found else "start"

    def differing(self, other: Cell) -> list[str]:
        """Files that are not those of another cell, bit by bit."""
        return [n for n in COMPARED if (self.folder / n).read_bytes() != (other.folder / n).read_bytes()]


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
    results = options.results or root / "results"
    if options.results is None:
        Cell(root / "artefacts", results, options.arm).finish()
    whole = Cell(root / "whole", results, options.arm)
    starts, trains = whole.finish()
    print(f"arm {options.arm}, {', '.join(SETTINGS[1:])}; --seed {options.seed}")
    print(f"a run that is left alone starts for {starts:.1f} s and trains for {trains:.1f} s", flush=True)
    cells, rows = [], []
    for number in range(1, options.kills + 1):
        sent, starting = choice.choice(SIGNALS), number % 4 == 0
        delay = choice.uniform(0.1, 1.0) * (starts if starting else trains)
        cell = Cell(root / f"kill{number}", results, options.arm)
        while (status := cell.kill(sent, starting, delay)) == 0:
            delay *= 0.5  # it was done before the signal came (the machine was busier at first): that is no kill
            assert delay > 0.01, f"{sent.name} does not end a process that starts"
            shutil.rmtree(cell.folder)
            cell.folder.mkdir()
        cell.finish()
        cost = json.loads((cell.folder / "out" / "cost.json").read_text())
        when = f"{delay:.1f} s {'after the start' if starting else 'into training'}"
        rows.append([number, sent.name, when, status, cell.resumed, cost["restarts"]])
        cells.append(cell)
        print(*rows[-1], flush=True)
    folders = [str(cell.folder) for cell in (whole, *cells)]
    subprocess.run([sys.executable, "-c", SCORE, str(results), *folders], cwd=ROOT, check=True)
    wrong = [cell.differing(whole) for cell in cells]
    print("\n| kill | signal | when | exit status | went on from step | restarts | differing |")
    print("|---|---|---|---|---|---|---|")
    for row, names in zip(rows, wrong, strict=True):
        print(f"| {' | '.join(map(str, row))} | {', '.join(names) or 'nothing'} |")
    print(f"\n{sum(not names for names in wrong)} of {len(wrong)} identical bit by bit: {', '.join(COMPARED)}")
    if any(wrong):
        print(f"kept: {root}")
    else:
        shutil.rmtree(root)
    return int(any(wrong))


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # a shell ignores SIGINT in what it starts in the background, and the cells would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

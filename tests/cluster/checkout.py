"""A checkout on the cluster, as a user would have it: Snakemake started, cells held still, results compared."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from cluster import HOME, ROOT, Cluster, wait_for

ARMS = ("control", "exp1", "exp3")
SEEDS = (0, 1)
PROFILE = "--profile profiles/slurm-test"
REPORT = "results/report.html"
RUN_SECONDS = 1800
"""The longest that any run of Snakemake may take here."""


def reduced(settings: dict) -> dict:
    """The embedded experiment with few arms, seeds, examples and steps; from the shipped file, so that it follows it."""
    for source in settings["data"]["sources"]:
        source |= {"train": 120, "validation": 30, "test": 24}
    return settings | {
        "seeds": list(SEEDS),
        "arms": {name: settings["arms"][name] for name in ARMS},
        "layer_map": {"examples": 20, "warmup_steps": 10},
        "train": settings["train"] | {"steps": 150, "eval_every": 50, "log_every": 25, "checkpoint_every": 10},
        "evaluate": settings["evaluate"] | {"max_new_tokens": 8},
        "stats": {"resamples": 500},
    }


def check_out(folder: Path) -> None:
    """What git knows or would add, with the reduced experiment as its configuration."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, found.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    path = folder / "config" / "config.yaml"
    settings = reduced(yaml.safe_load(path.read_text(encoding="utf-8")))
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def compared(checkout: Path) -> dict[str, bytes]:
    """What must not depend on where and how often it was computed: statistics, scores, curves, weights."""
    results = checkout / "results"
    patterns = ("stats/*.csv", "evaluate/**/*.parquet", "train/*/*/history.jsonl", "train/*/*/model/*.safetensors")
    return {str(p.relative_to(results)): p.read_bytes() for g in patterns for p in sorted(results.glob(g))}


@dataclass
class Row:
    """One line of the summary."""

    name: str
    happened: str = ""
    seconds: float = 0.0
    jobs: int = 0
    restarts: int = 0
    outcome: str = "failed"


SUMMARY: list[Row] = []


class Site:
    """The user's checkout on the cluster; `outside` is the same folder seen from this machine, with what is mounted there."""

    def __init__(self, cluster: Cluster, expected: dict[str, bytes]):
        self.cluster, self.expected = cluster, expected
        self.inside = HOME / "kvpipe"
        self.outside = cluster.seen(self.inside)
        self.log = cluster.home / "snakemake.log"
        self.runs: list[subprocess.Popen] = []

    # ------------------------------------------------------------ Snakemake
    def start(self, options: str = PROFILE, target: str = REPORT) -> subprocess.Popen:
        """Start Snakemake on the login side."""
        run = self.cluster.start(f"python3 -m snakemake {options} -- {target}", self.log, self.inside)
        self.runs.append(run)
        return run

    def tell(self) -> str:
        """The state of affairs, for the message of a failure."""
        queue = self.cluster.run("squeue --states=all --format '%.6i %.20j %.12T %.8M %.30k %r' || true")
        return f"{queue}\n{self.log.read_text(encoding='utf-8')[-6000:]}"

    def finish(self, process: subprocess.Popen, seconds: float = RUN_SECONDS) -> int:
        """Wait for Snakemake's end; its exit status."""
        wait_for("Snakemake to end", lambda: process.poll() is not None, seconds, tell=self.tell)
        return process.returncode

    def kill(self, process: subprocess.Popen) -> None:
        """Kill Snakemake as a crash of the login node would: at once, its jobs go on."""
        for member in psutil.Process(process.pid).children(recursive=True):
            member.kill()
        process.wait(timeout=30)

    def unlock(self) -> None:
        """What Snakemake asks for after a crash."""
        self.cluster.run(f"python3 -m snakemake {PROFILE} --unlock", 120, folder=self.inside)

    def settle(self) -> None:
        """No job, no Snakemake, no lock, node and controller up: whatever a failed test has left."""
        for run in self.runs:
            if run.poll() is None:
                self.kill(run)
        self.cluster.restore()
        self.cluster.run("scancel --me")
        for process in self.cluster.processes():
            if process.status() == psutil.STATUS_STOPPED:
                thaw(process)
        wait_for("an empty queue", lambda: not self.cluster.run("squeue --noheader").strip(), 120, 1, self.tell)
        if (self.outside / ".snakemake/locks").is_dir() and any((self.outside / ".snakemake/locks").iterdir()):
            self.unlock()

    # ------------------------------------------------------------ cells
    def drop(self, arm: str, seed: int) -> None:
        """Remove a cell and the report, so that the cell and what follows from it run again, and nothing else.

        While the report is there and newer than its inputs, Snakemake does not ask after what those were made from.
        """
        shutil.rmtree(self.outside / f"results/train/{arm}/seed{seed}", ignore_errors=True)
        (self.outside / f"results/evaluate/{arm}/seed{seed}.parquet").unlink(missing_ok=True)
        (self.outside / REPORT).unlink(missing_ok=True)

    def cost(self, arm: str, seed: int) -> dict:
        """The cost sheet of a cell."""
        return json.loads((self.outside / f"results/train/{arm}/seed{seed}/cost.json").read_text(encoding="utf-8"))

    def checkpoints(self, arm: str, seed: int) -> list[str]:
        """Names of a cell's checkpoints."""
        return sorted(p.name for p in (self.outside / f"results/checkpoints/{arm}/seed{seed}").glob("step-*"))

    def trainings(self, arm: str, seed: int) -> list[psutil.Process]:
        """The processes of Python that train a cell."""
        words = ["-m", "kvpipe", "train", "--made", "--arm", arm, "--seed", str(seed)]
        found = []
        for process in self.cluster.processes():
            with suppress(psutil.NoSuchProcess):
                # accelerate's launcher starts its own with -u
                if [word for word in process.cmdline() if word != "-u"][1 : 1 + len(words)] == words:
                    found.append(process)
        return found

    def freeze(self, arm: str, seed: int, before: bool = False) -> psutil.Process:
        """Hold a cell's training still once it has a checkpoint, or `before` its first; returns the process."""
        process = wait_for(
            f"the training of {arm}, seed {seed}", lambda: self.trainings(arm, seed), 600, 0.2, self.tell
        )[0]
        if not before:
            wait_for("its first checkpoint", lambda: self.checkpoints(arm, seed), 300, 0.01, self.tell)
        process.suspend()
        assert bool(self.checkpoints(arm, seed)) is not before, "the cell could not be held still in time"
        return process

    def find_job(self, arm: str, seed: int, rule: str = "train") -> str | None:
        """The SLURM job in which a rule now runs for a cell."""
        for line in self.cluster.run("squeue --noheader --states=running --format '%i %k'").splitlines():
            number, comment = line.split()
            if comment == f"rule_{rule}_wildcards_{arm}_{seed}":
                return number
        return None

    def job(self, arm: str, seed: int) -> str:
        """The SLURM job in which a cell is trained."""
        found = self.find_job(arm, seed)
        assert found, f"no job trains {arm}, seed {seed}\n{self.tell()}"
        return found

    def wait_state(self, job: str, *states: str, seconds: float = 180) -> str:
        """Wait until a job is in one of these states."""
        return wait_for(
            f"job {job} to be {' or '.join(states)}",
            lambda: (state := self.cluster.jobs().get(job, "gone")) in states and state,
            seconds,
            1,
            self.tell,
        )

    def next_job(self) -> int:
        """The number that the next job gets; squeue forgets jobs after MinJobAge, this counts on."""
        found = re.search(r"^NEXT_JOB_ID\s*=\s*(\d+)", self.cluster.run("scontrol show config"), flags=re.MULTILINE)
        assert found is not None
        return int(found[1])

    # ------------------------------------------------------------ a fault
    @contextmanager
    def scenario(self, name: str) -> Iterator[Row]:
        """Measure what happens inside, and demand a complete report at its end, identical to that of the local run."""
        row = Row(name)
        SUMMARY.append(row)
        first, begun, started = self.next_job(), time.monotonic(), time.time()
        try:
            yield row
        except BaseException as error:
            row.outcome = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"[:100]
            raise
        finally:
            row.seconds = time.monotonic() - begun
            row.jobs = self.next_job() - first
        row.outcome = "failed: the results differ"
        found = compared(self.outside)
        assert found.keys() == self.expected.keys()
        assert [k for k in found if found[k] != self.expected[k]] == [], "differ from those of the local run"
        report = self.outside / REPORT
        assert report.stat().st_mtime > started and report.read_text(encoding="utf-8").rstrip().endswith("</html>")
        row.outcome = "identical"


def thaw(process: psutil.Process) -> None:
    """Let a process go on, if it is still there."""
    if process.is_running():
        process.send_signal(signal.SIGCONT)

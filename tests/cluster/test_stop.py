"""A cell in the image is told to end, at four places, ten times each: nothing is lost but the step in hand.

SLURM's TERM reaches every process of a job's step, squashfuse too, which serves the image's files: Python goes on without them.
That is done here to the processes of `apptainer exec`, so that the moment is ours.
"""

import random
import re
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest
from cluster import HOME, wait_for

# forty processes that import torch from an image: a quarter of an hour
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

IMAGE = "apptainer exec --home $PWD containers/kvpipe.sif"
SETTINGS = "--set train.steps=600 --set train.checkpoint_every=10 --set train.eval_every=100"
SPOTS = ("step 0", "step 1", "between checkpoints", "after a checkpoint")
TIMES = 10
CHOICE = random.Random(20261129)


class Stops:
    """One cell, begun, stopped and gone on with."""

    def __init__(self, cluster):
        self.cluster, self.folder = cluster, cluster.home / "kvpipe"
        self.log = cluster.home / "stop.log"
        self.checkpoints = self.folder / "stop.checkpoints"
        arm = "--arm control"
        cluster.run(f"{IMAGE} python -m kvpipe prepare {arm} --results prepared", 3600, folder=HOME / "kvpipe")
        self.command = f"{IMAGE} python -m kvpipe train --made {arm} --seed 0 --results prepared {SETTINGS}"

    def start(self, out: str = "stop") -> subprocess.Popen:
        """A process in the image that begins, or goes on."""
        return self.cluster.start(f"exec {self.command} --out {out}", self.log, HOME / "kvpipe")

    def steps(self) -> list[int]:
        """Steps that have a checkpoint."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))

    def wait(self, what: str, condition) -> None:
        """Wait for a moment, looking as often as a step may be short."""
        wait_for(what, condition, 3600, 0.002, lambda: self.log.read_text(encoding="utf-8"))

    def signal(self, process: subprocess.Popen) -> int:
        """TERM to all that belongs to the image, the server of its files first; the exit status."""
        family = psutil.Process(process.pid).children(recursive=True)
        family.sort(key=lambda member: "squashfuse" not in member.name())
        assert "squashfuse" in family[0].name(), "the image is not served by squashfuse: nothing would be tried"
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGTERM)
        return process.wait(timeout=600)

    def stop(self, spot: str) -> str:
        """Stop a process at a place of its run; what its log says at the end."""
        if spot in ("step 0", "step 1"):
            self.cluster.run("rm -rf stop.checkpoints stop", folder=HOME / "kvpipe")
        before = self.steps()[-1:] or [0]
        process = self.start()
        if spot == "step 0":
            self.wait("the first line", lambda: "step 0/" in self.log.read_text(encoding="utf-8"))
        else:
            self.wait("the first checkpoint of this process", lambda: self.steps()[-1:] > before)
        if spot == "after a checkpoint":
            self.wait("a checkpoint by the count", lambda: self.steps()[-1] > before[0] + 1)
        elif spot == "between checkpoints":
            time.sleep(CHOICE.uniform(0, 0.5))
        status = self.signal(process)
        said = self.log.read_text(encoding="utf-8")
        # at step 0 a bus error may be faster: the first step still needs pages of the image, and nothing is there to be saved
        assert status == 75 or (spot == "step 0" and status == -signal.SIGBUS), f"{spot}: {status}\n{said[-3000:]}"
        return next((line for line in said.splitlines() if line.startswith("stopped by signal 15")), "")


@pytest.fixture(scope="module")
def stops(cluster, image):
    return Stops(cluster)


@pytest.mark.parametrize("number", range(TIMES))
@pytest.mark.parametrize("spot", SPOTS)
def test_nothing_is_lost_but_the_step_in_hand(stops, spot, number):
    said = stops.stop(spot)
    step = re.search(r"after step (\d+)", said)
    # where a step was done, the last one is saved; before that there is nothing to save
    assert stops.steps()[-1:] == ([int(step[1])] if step else []), said


def test_what_was_stopped_so_often_is_what_was_not(stops):
    process = stops.start()
    assert process.wait(timeout=3600) == 0, stops.log.read_text(encoding="utf-8")
    assert "continuing after step" in stops.log.read_text(encoding="utf-8")
    stopped = {
        name: (stops.folder / "stop" / name).read_bytes() for name in ("history.jsonl", "model/model.safetensors")
    }
    assert stops.start("whole").wait(timeout=3600) == 0
    assert stopped == {name: (stops.folder / "whole" / name).read_bytes() for name in stopped}

"""Bars on a terminal, lines in a log."""

import os
import pty
import subprocess
import sys

import pytest

from kvpipe.experiment import progress
from kvpipe.experiment.progress import Progress, track


@pytest.fixture
def clock(monkeypatch):
    """Sets what the clock will say."""

    def says(*times: float) -> None:
        left = iter(times)
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(left))

    return says


def test_a_log_says_how_far_it_is_and_how_long_it_will_take(capsys, clock):
    clock(0.0, 4.0, 16.0, 40.0)
    with Progress("shard", 4000, "tokens") as bar:
        for tokens, note in ((400, ""), (1200, "loss 2.5"), (2400, "")):
            bar.add(tokens, note)
    assert capsys.readouterr().err.splitlines() == [
        "shard: 1,600 of 4,000 tokens, 100 tokens/s, loss 2.5, 24 s left",
        "shard: 4,000 of 4,000 tokens, 100 tokens/s, 0 s left",
    ]


def test_what_is_over_within_seconds_says_nothing(capsys, clock):
    clock(0.0, 4.0, 9.0)
    assert list(track([1, 2], "reading", "texts")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_counts_its_own_steps_for_the_rate(capsys, clock):
    clock(0.0, 20.0)
    with Progress("training", 100, "steps", done=50) as bar:
        bar.add(10)
    assert capsys.readouterr().err == "training: 60 of 100 steps, 0.5 steps/s, 80 s left\n"


def test_one_process_of_a_group_speaks(capsys, clock, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    clock(0.0, 20.0)
    with Progress("training", 2, "steps") as bar:
        bar.add()
    assert capsys.readouterr().err == ""


PROGRAM = """
from kvpipe.experiment import progress
with progress.Progress("training", 3, "steps") as bar:
    for step in range(3):
        for _ in progress.track([5, 6], "scoring", "examples", lambda n: n):
            progress._display.refresh()
        bar.add(1, f"loss {3 - step}.25")
        progress._display.refresh()
        print(f"a line of step {step}")
print("the end")
"""


def test_a_terminal_shows_bars_and_keeps_the_lines():
    """Of two steps, one inside the other; the lines stay, the bars go."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    environment.pop("RANK", None)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    assert process.wait() == 0
    text = seen.decode()
    assert "training" in text and "scoring" in text and "5/11" in text and "loss 2.25" in text and "steps/s" in text
    lines = [line.split("\x1b[2K")[-1].split("\x1b[?25h")[-1] for line in text.replace("\r", "\n").split("\n")]
    assert [line for line in lines if line.startswith("a line of")] == [f"a line of step {step}" for step in range(3)]
    assert text.rstrip().endswith("the end")

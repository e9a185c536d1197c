"""The grid of cells."""

import io
import json
import os
import time

import pytest
from rich.console import Console
from tiny import config

from kvpipe.dag import Dag, Paths
from kvpipe.status import RUNNING_WITHIN, cell_state, grid


@pytest.fixture
def paths(tmp_path):
    return Paths(tmp_path / "results")


def log(paths, text, arm="two", seed=1, age=0.0):
    path = paths.root / "logs" / "train" / arm / f"seed{seed}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)


def done(paths, arm="two", seed=1, scored=True):
    folder = paths.cell(arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.json").write_text(json.dumps({"train_seconds": 61.7, "peak_memory_bytes": 2.34e9}))
    if scored:
        paths.items(arm, seed).parent.mkdir(parents=True, exist_ok=True)
        paths.items(arm, seed).touch()


def test_missing(paths):
    assert cell_state(paths, "two", 1) == ("missing", "")


def test_running_shows_the_last_line(paths):
    log(paths, "step 0/400\nstep 25/400  validation loss 3.1\n")
    assert cell_state(paths, "two", 1) == ("running", "step 25/400  validation loss 3.1")


def test_silent_for_too_long_is_failed(paths):
    log(paths, "step 25/400\n", age=RUNNING_WITHIN + 60)
    assert cell_state(paths, "two", 1)[0] == "failed"
    # a fresh checkpoint is a sign of life
    (paths.checkpoints("two", 1) / "step-00000050").mkdir(parents=True)
    assert cell_state(paths, "two", 1)[0] == "running"


@pytest.mark.parametrize("end", ["", "(set KVPIPE_TRACEBACK=1 for the traceback)\n"])
def test_an_error_is_failed_at_once_and_shown(paths, end):
    """What the command line prints last is a hint, not the error."""
    log(paths, f"step 25/400\nNonFiniteLossError: step 26: loss term 'k' is NaN\n{end}")
    state, detail = cell_state(paths, "two", 1)
    assert state == "failed"
    assert detail.startswith("NonFiniteLossError: step 26")


def test_trained_and_done_show_time_and_memory(paths):
    done(paths, scored=False)
    assert cell_state(paths, "two", 1) == ("trained", "62 s, 2.34 GB")
    done(paths)
    assert cell_state(paths, "two", 1) == ("done", "62 s, 2.34 GB")


def test_the_grid_has_every_cell(paths, tmp_path):
    dag = Dag(config(tmp_path))
    done(paths)
    log(paths, "KeyError: [red]no such [/b] tag\n", arm="one", seed=0)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(grid(dag, paths))
    text = console.export_text()
    assert f"1 of {len(dag.cells)} cells done" in text
    lines = {
        line.split()[1]: line for line in text.splitlines() if "missing" in line or ("done" in line and "│" in line)
    }
    assert set(dag.arms) <= set(lines)
    assert "missing" in lines["two"]
    assert "62 s, 2.34 GB" in lines["two"]
    assert "[red]no such [/b] tag" in lines["one"], "a message is no markup"

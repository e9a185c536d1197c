"""The grid of cells."""

import io
import json
import os
import time

import pandas as pd
import pytest
from rich.console import Console
from tiny import config

from kvpipe.experiment.attempts import record_of, total
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.report.status import RUNNING_WITHIN, cell, overview


def cell_state(paths, arm, seed):
    found = cell(paths, arm, seed)
    return found.state, found.detail


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
    cost = {"train_seconds": 61.7, "peak_memory_bytes": 2.34e9, "model": {"digest": "sha256:now"}}
    (folder / "cost.json").write_text(json.dumps(cost))
    if scored:
        scores(paths.items(arm, seed), "sha256:now")


def scores(path, digest):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"id": ["a"]})
    table.attrs["model"] = digest
    table.to_parquet(path, index=False)


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


def test_a_stopped_cell_is_not_failed_whatever_its_image_says_at_the_end(paths):
    line = "stopped by signal 15 after step 3; run the same command to go on"
    log(paths, f"step 0/400\n{line}\nOSError: [Errno 107] Transport endpoint is not connected\n")
    assert cell_state(paths, "two", 1) == ("stopped", line)


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


def test_scores_count_where_they_are_of_these_weights_whatever_the_files_times(paths):
    done(paths)
    items = paths.items("two", 1)
    os.utime(items, (1.0, 1.0))
    assert cell_state(paths, "two", 1)[0] == "done", "a copy keeps no times"
    scores(items, "sha256:before")
    assert cell_state(paths, "two", 1)[0] == "trained"
    items.write_bytes(b"cut off")
    assert cell_state(paths, "two", 1)[0] == "trained"


def test_each_cell_is_shown_once(paths, tmp_path):
    dag = Dag(config(tmp_path))
    done(paths)
    log(paths, "KeyError: [red]no such [/b] tag\n", arm="one", seed=0)
    text = shown(dag, paths)
    assert f"1 of {len(dag.cells)} cells done" in text
    grid, _, below = text.rpartition("┘")
    rows = {line.split("│")[1].strip(): line for line in grid.splitlines() if line.startswith("│")}
    assert list(rows) == list(dag.arms)
    assert "missing" in rows["two"] and rows["two"].count("done 62 s, 2.34 GB") == 1
    assert "failed" in rows["one"] and "no such" not in rows["one"]
    assert below.count("[red]no such [/b] tag") == 1, "a message is no markup, and stands there once"
    assert "two" not in below, "a finished cell is in the grid alone"


# ---------------------------------------------------------------- cost
def attempt(paths, name, seconds, memory=2e9, device="cpu", processes=1, arm="two", seed=1):
    line = {"attempt": name, "device": device, "processes": processes, "seconds": seconds, "peak_memory_bytes": memory}
    file = record_of(paths.checkpoints(arm, seed))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        handle.write(json.dumps(line) + "\n")
    return file


def test_attempts_add_up_by_their_last_line(paths):
    file = attempt(paths, "a", 10.0)
    attempt(paths, "a", 100.0, memory=3e9, device="cuda:0", processes=4)
    attempt(paths, "b", 50.0, device="cuda:0", processes=4)
    with file.open("a") as handle:
        handle.write('{"attempt": "c", "seco')
    assert total(file) == {"attempts": 2, "wall_seconds": 150.0, "gpu_seconds": 600.0, "peak_memory_bytes": 3e9}
    assert total(paths.root / "nothing") is None


def shown(dag, paths):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(overview(dag, paths))
    return console.export_text()


def test_the_cost_counts_killed_attempts_and_unfinished_cells(paths, tmp_path):
    dag = Dag(config(tmp_path))
    assert "training so far" not in shown(dag, paths)
    attempt(paths, "a", 3600.0, device="cuda:0")
    attempt(paths, "b", 1800.0, device="cuda:0", memory=7.5e9)
    log(paths, "OutOfMemory: out of memory while training. Set train.accumulate: 2\n(set KVPIPE_TRACEBACK=1 …)\n")
    text = shown(dag, paths)
    assert "failed 1.50 h, 7.50 GB, 1 restart " in text
    assert "training so far, all attempts of 1 cell: 1.50 h, 1.50 GPU hours, at most 7.50 GB, 1 restart\n" in text
    assert "failed: two seed 1: OutOfMemory: out of memory while training. Set train.accumulate: 2" in text
    assert "seed1.log" in text


def test_a_laptop_has_no_gpu_hours(paths, tmp_path):
    attempt(paths, "a", 36.0)
    text = shown(Dag(config(tmp_path)), paths)
    assert "GPU hours" not in text
    assert "all attempts of 1 cell: 36 s, at most 2.00 GB, 0 restarts" in text


def test_one_log_per_attempt_the_newest_counts(paths):
    log(paths, "KeyError: first\n", age=100)
    newest = paths.root / "logs" / "train" / "two" / "seed1.2.log"
    newest.write_text("step 3/9\n")
    other = paths.root / "logs" / "train" / "two" / "seed10.log"
    other.write_text("KeyError: another cell\n")
    assert cell_state(paths, "two", 1) == ("running", "step 3/9")

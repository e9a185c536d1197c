"""Kept cells: text files from which report and statistics come out the same without weights, and what makes them stale."""

import json
import shutil
import time
from copy import deepcopy
from pathlib import Path

import pandas as pd
import pytest
from tiny import ARMS, build, config

from kvpipe.experiment.paths import Paths
from kvpipe.steps.cells import ITEMS, LIMIT, MADE, KeptCells, check_cell, report_cells, run_cells
from kvpipe.steps.inputs import Inputs

CELLS = [("control", 0), ("control", 1), ("one", 0), ("one", 1)]
SMALL = {"arms": {name: ARMS[name] for name in ("control", "one")}, "audit.allow": ["tokens"]}


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All cells of two arms, made and kept; and every line that was said."""
    folder = tmp_path_factory.mktemp("cells")
    kept, said = KeptCells(build(folder, deepcopy(SMALL)), folder / "kept"), []
    begun = time.monotonic()
    assert run_cells(kept, CELLS, True, None, said.append) == 0
    (folder / "seconds").write_text(str(time.monotonic() - begun))
    return kept, said, folder


def elsewhere(done, tmp_path, overrides=None) -> KeptCells:
    """The kept cells and the configuration on a machine that has nothing else."""
    kept, _, folder = done
    return KeptCells(
        Inputs(config(folder, deepcopy(SMALL) | (overrides or {})), Paths(tmp_path / "results")), kept.folder
    )


def test_a_kept_cell_is_text_and_small(done):
    kept, said, _ = done
    assert [line for line in said if ", seed " in line] == [f"{arm}, seed {seed} …" for arm, seed in CELLS]
    for cell in CELLS:
        files = sorted(kept.folder_of(*cell).iterdir())
        assert [path.name for path in files] == ["cost.json", "history.jsonl", ITEMS, MADE]
        assert sum(path.stat().st_size for path in files) < LIMIT and all(path.read_text("utf-8") for path in files)


def test_a_cell_costs_what_it_took_itself(done):
    """Not what its process did before it."""
    kept, _, folder = done
    later = [json.loads((kept.folder_of(*cell) / "cost.json").read_text("utf-8")) for cell in CELLS[1:]]
    assert 0 < sum(cost["wall_seconds"] for cost in later) < float((folder / "seconds").read_text())
    assert all(cost["wall_seconds"] >= cost["train_seconds"] for cost in later)


def test_statistics_without_weights_are_those_with_them(done, tmp_path):
    kept = done[0]
    report_cells(kept, tmp_path / "here.html", quiet)
    there = elsewhere(done, tmp_path)
    report_cells(there, tmp_path / "there.html", quiet)
    assert not (tmp_path / "results" / "models").exists() and not list((tmp_path / "results").rglob("*.safetensors"))
    for table in ("arms.csv", "contrasts.csv", "pairs.csv"):
        assert (there.paths.stats / table).read_text() == (kept.paths.stats / table).read_text(), table
    page = (tmp_path / "there.html").read_text()
    assert ("The records are absent" in page and "4 of 4" in page) or "cells are not finished" not in page


def test_a_kept_cell_is_done_and_its_scores_come_back_whole(done, tmp_path):
    kept, said = elsewhere(done, tmp_path), []
    kept.restore("one", 1)
    pd.testing.assert_frame_equal(
        pd.read_parquet(kept.paths.items("one", 1)).drop(columns=["text", "prediction"]),
        pd.read_parquet(done[0].paths.items("one", 1)).drop(columns=["text", "prediction"]),
        check_dtype=False,
    )
    assert pd.read_parquet(kept.paths.items("one", 1)).attrs == pd.read_parquet(done[0].paths.items("one", 1)).attrs
    assert run_cells(done[0], CELLS, True, None, said.append) == 0
    assert not said, "nothing is made"


@pytest.mark.parametrize(
    ("overrides", "stale"),
    [
        ({"train.steps": 7}, {"control", "one"}),
        ({"arms.one.set": {"teachers": ["alpha"], "loss": {"values": {}}}}, {"one"}),
        ({"arms.one.label": "in other words", "train.threads": 2, "title": "other"}, set()),
        ({"evaluate.max_new_tokens": 6}, {"control", "one"}),
    ],
)
def test_what_makes_a_kept_cell_stale(done, tmp_path, overrides, stale):
    kept = elsewhere(done, tmp_path, overrides)
    assert {arm for arm, seed in CELLS if kept.differs(arm, seed)} == stale


def test_other_data_and_other_weights_make_it_stale(done, tmp_path):
    kept = done[0]
    other = KeptCells(kept.inputs, tmp_path)
    shutil.copytree(kept.folder / "one", tmp_path / "one")
    path = tmp_path / "one" / "seed0" / MADE
    made = json.loads(path.read_text())
    for kind, name in (("data", "train"), ("models", "alpha")):
        path.write_text(json.dumps(made | {kind: made[kind] | {name: "another"}}))
        assert other.differs("one", 0) == [f"{kind}: {name}"]
    path.write_text(json.dumps(made | {"code": "another", "commit": "another"}))
    assert other.differs("one", 0) == []
    assert other.differs("control", 0) is None


def test_no_cell_begins_after_its_time(done, tmp_path):
    kept = KeptCells(done[0].inputs, tmp_path)
    assert run_cells(kept, CELLS, True, 0.0, quiet) == len(CELLS) and not list(Path(tmp_path).iterdir())


def test_a_cell_made_again_is_alike_and_a_forged_one_is_found(done, tmp_path):
    kept, said = done[0], []
    assert check_cell(kept, tmp_path / "again", 3, said.append)
    assert "drawn of 4" in said[0] and "(0.00%" in said[-1]
    forged = KeptCells(kept.inputs, tmp_path / "kept")
    shutil.copytree(kept.folder, forged.folder)
    for cell in CELLS:
        path = forged.folder_of(*cell) / ITEMS
        items = pd.read_csv(path)
        items.assign(nll=items.nll * 0.9).to_csv(path, index=False)
    assert not check_cell(forged, tmp_path / "again", 3, quiet)

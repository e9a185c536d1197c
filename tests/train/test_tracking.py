"""What a cell measures reaches a tracker: TensorBoard's own files, read by its own reader."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import build

from kvpipe.config import ConfigError
from kvpipe.steps.train import make_cell
from kvpipe.train.tracking import check_trackers

SETTINGS = {"train.steps": 4, "train.log_every": 1, "train.eval_every": 2, "train.report_to": ["tensorboard"]}


def scalars(folder) -> dict[str, dict[int, float]]:
    """Tag → step → value."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def test_tensorboard_has_every_line_of_the_history(tmp_path):
    work = build(tmp_path, SETTINGS)
    quiet = {"log": lambda *_: None}
    for arm, seed in (("one", 0), ("one", 1), ("control", 0)):
        make_cell(work, arm, seed, **quiet)
    runs = {path.parent.relative_to(work.paths.trackers).as_posix() for path in tmp_path.rglob("events.out*")}
    assert runs == {"one/seed0", "one/seed1", "control/seed0"}, "one run a cell, grouped by arm"
    lines = [json.loads(line) for line in work.paths.history("one", 0).read_text().splitlines()]
    expected: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                expected.setdefault(name, {})[line["step"]] = value
    found = scalars(work.paths.trackers / "one" / "seed0")
    memory = found.pop("peak_memory_gb")
    assert set(memory) == {0, 1, 2, 3, 4} and min(memory.values()) > 0.05
    assert found.keys() == expected.keys()
    assert {"cross_entropy", "keys", "values", "learning_rate", "grad_norm", "validation_loss"} <= found.keys()
    assert set(found["grad_ratio_keys"]) == {2, 4}
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-7), name
    assert "keys" not in scalars(work.paths.trackers / "control" / "seed0")


def test_a_cell_that_is_trained_again_takes_the_place_of_what_it_said(tmp_path):
    make_cell(build(tmp_path, SETTINGS | {"train.steps": 6}), "control", 0, log=lambda *_: None)
    work = build(tmp_path, SETTINGS)
    make_cell(work, "control", 0, log=lambda *_: None)
    assert set(scalars(work.paths.trackers / "control" / "seed0")["grad_norm"]) == {1, 2, 3, 4}


def test_another_tracker_makes_no_cell_stale(tmp_path):
    work, other = build(tmp_path, SETTINGS), build(tmp_path, {**SETTINGS, "train.report_to": []})
    assert work.steps["train"].depends(arm="one") == other.steps["train"].depends(arm="one")


def test_trackers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"unknown 'tensorbord'; did you mean 'tensorboard'\?"):
        check_trackers(["tensorbord"])
    with pytest.raises(ConfigError, match=r"comet_ml is not installed: pip install comet_ml, or leave it out"):
        check_trackers(["comet_ml"])

"""Preflight: what a small copy shows of the terms and of the whole grid's cost, against the experiment itself."""

import json
import os
from copy import deepcopy
from types import SimpleNamespace

import pytest
import yaml
from tiny import ARMS, build, config
from typer.testing import CliRunner

from kvpipe.cli import app
from kvpipe.experiment.paths import Paths
from kvpipe.preflight.copy import Size
from kvpipe.preflight.costs import Scaling, term_pulls
from kvpipe.preflight.measure import Measured, RehearsedCell, apart
from kvpipe.preflight.rehearse import preflight
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import prepare
from kvpipe.train.step import Pull
from kvpipe.train.trainer import Rehearsal


def quiet(*_):
    """Says nothing."""


CHOSEN = {name: ARMS[name] for name in ("control", "one", "two", "cka", "logit")}
WRITTEN = {"base": "two", "role": "experiment", "set": {"time": {"kind": "segment", "reasoning": "written"}}}
SETTINGS = {"arms": CHOSEN | {"written": WRITTEN}, "teacher_text.max_new_tokens": 4}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the command says of two arms, and the experiment that it looked at."""
    folder = tmp_path_factory.mktemp("preflight")
    made = build(folder, {"arms": CHOSEN})
    work = Inputs(config(folder, SETTINGS), made.paths)
    file, out = folder / "config.yaml", folder / "found.json"
    file.write_text(yaml.safe_dump(work.config.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    options = ["--config", str(file), "--results", str(work.paths.root), "--batches", "2", "--out", str(out)]
    arms = [word for arm in ("control", "one", "cka", "logit", "written") for word in ("--arm", arm)]
    done = CliRunner().invoke(app.app, ["preflight", *options, *arms], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return SimpleNamespace(work=work, said=done.output, **json.loads(out.read_text(encoding="utf-8")))


def test_every_term_of_every_arm_has_a_line(found):
    lines = {(one["arm"], one["term"]): one for one in found.terms}
    kv = {"cross_entropy", "keys", "values"}
    expected = {(arm, term) for arm in ("one", "cka", "written") for term in kv}
    assert set(lines) == expected | {("control", "cross_entropy"), ("logit", "cross_entropy"), ("logit", "logits")}
    for (_, term), one in lines.items():
        assert one["value"] > 0
        assert one["gradient"] > 0
        assert (one["suggested"] is None) == (term == "cross_entropy")
        assert one["gradient"] == pytest.approx(1) or term != "cross_entropy"


def test_the_copy_is_gone_and_nothing_of_the_grid_was_made(found):
    paths = found.work.paths
    assert not paths.preflight.exists()
    assert not paths.store("alpha", "student").exists()
    assert not paths.layer_map("alpha").exists()


def test_every_rule_of_the_arms_has_its_jobs(found):
    jobs = {cost["rule"]: cost["jobs"] for cost in found.rules}
    assert jobs == {
        "encode": 5,  # student and both teachers, and what these have written
        "teacher_kv": 4,
        "layer_map": 2,
        "fit": 3,
        "teacher_text": 2,
        "train": 10,
        "evaluate": 10,
        "untrained": 1,
        "teacher_quality": 2,
    }
    assert all(cost["hours"] > 0 and cost["peak"] > 1e8 for cost in found.rules)
    assert found.hours == pytest.approx(sum(cost["hours"] for cost in found.rules))
    for words in ("The whole grid", "suggested weight", "A cell of each arm"):
        assert words in found.said


def test_the_stores_take_what_was_announced(found):
    for arm in ("one", "cka"):
        prepare(found.work, arm, log=quiet)
    pairs = [("alpha", "student"), ("beta", "student")]
    real = sum(path.stat().st_size for pair in pairs for path in found.work.paths.store(*pair).glob("*.safetensors"))
    announced = next(cost["disk"] for cost in found.rules if cost["rule"] == "teacher_kv")
    # those of written texts are two more, of longer texts
    assert 1.8 * real < announced < 4 * real


def test_with_the_suggested_weights_every_term_pulls_alike(found):
    """The same copy under other weights."""
    suggested = {one["term"]: one["suggested"] for one in found.terms if one["arm"] == "one"}
    weights = {f"arms.one.set.loss.{term}.weight": suggested[term] for term in ("keys", "values")}
    root = found.work.paths.root
    again = preflight(config(root.parent, deepcopy(SETTINGS) | weights), Paths(root), ["one"], 2, log=quiet)
    pulls = {one.term: one.gradient for one in again.terms}
    assert pulls == {term: pytest.approx(share, rel=1e-3) for term, share in
                     {"cross_entropy": 1, "keys": 0.5, "values": 0.5}.items()}  # fmt: skip


def test_an_unknown_arm_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(KeyError, match="no arm 'ten'; the configuration has control"):
        preflight(config(tmp_path), Paths(tmp_path / "results"), ["ten"], log=quiet)
    assert not (tmp_path / "results").exists()


def test_a_job_that_is_killed_is_said(tmp_path):
    with pytest.raises(RuntimeError, match="the process of _exit  was killed; memory ran out as a rule"):
        apart(config(tmp_path), os._exit, 9)


# ---------------------------------------------------------------- by hand
def test_a_term_without_gradient_has_no_weight_to_suggest():
    terms = {"cross_entropy": Pull(2.0, 0.5, 4.0), "keys": Pull(1.0, 3.0, 8.0), "values": Pull(1.0, 3.0, 0.0)}
    lines = {one.term: (one.gradient, one.suggested) for one in term_pulls("x", terms)}
    assert lines == {"cross_entropy": (1, None), "keys": (12, 0.125), "values": (0, None)}
    alone_ = term_pulls("x", {"keys": Pull(1.0, 3.0, 8.0)})
    assert (alone_[0].gradient, alone_[0].suggested) == (None, None)


def test_hours_grow_with_what_the_grid_reads(tmp_path):
    """Ten times the records, thirty times the tokens of a store."""
    settings = config(tmp_path, {"train.steps": 100, "train.eval_every": 50, "teacher_text.tries": 3})
    whole = Size({"train": 400, "validation": 20, "test": 60}, {("alpha", "student"): 9000})
    small = Size({"train": 40, "validation": 10, "test": 6}, {("alpha", "student"): 300})
    scale = Scaling(settings, ["control", "one"], whole, small, {"train": 5e8})
    seen = Rehearsal(2.0, 3.0, {})
    cells = {arm: RehearsedCell(10.0, 7 * 10**8, 1000, 3000, seen) for arm in ("control", "one")}
    measured = {
        ("teacher_kv", "alpha", "student"): Measured(5.0, 4.0, 10**9, 600),
        ("encode", "alpha", "student"): Measured(0.0, 1.0, 10**8, 50),
        ("layer_map", "alpha"): Measured(5.0, 1.0, 10**8),
        ("teacher_text", "alpha"): Measured(0.0, 2.0, 10**8),
        ("score", "untrained"): Measured(0.0, 6.0, 10**8),
    }
    costs = {cost.rule: cost for cost in scale.rules(measured, cells)}
    hours = {rule: cost.hours * 3600 for rule, cost in costs.items()}
    seeds = 2
    assert hours == {
        "teacher_kv": pytest.approx(5 + 30 * 4),
        "encode": pytest.approx(10),
        # 5 validation examples are read in both, and 2 steps of a stand-in for a student from scratch
        "layer_map": pytest.approx(5 + 1 + 2 * 2),
        # 8 prompts, one try
        "teacher_text": pytest.approx(2 * 3 * 400 / 8),
        # validation before the first step, after 50 and 100
        "train": pytest.approx(seeds * 2 * (10 + 200 + 3 * 2 * 3)),
        "evaluate": pytest.approx(seeds * 2 * 10 * 6),
        "untrained": pytest.approx(60),
    }
    assert costs["teacher_kv"].disk == 30 * 600
    assert costs["train"].disk == seeds * 2 * 1000 + 2 * 3000
    assert (costs["train"].announced, costs["encode"].announced) == (5e8, None)

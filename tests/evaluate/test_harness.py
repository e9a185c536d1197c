"""lm-evaluation-harness: the same items, the same figures. What needs the package is skipped where it is not installed."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from kvpipe.config import EvaluateConfig, parse
from kvpipe.evaluate import harness
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.steps import table

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm_eval is not installed: pip install "kvpipe[lm-eval]"'
)


@needs_lm_eval
def test_our_figures_are_the_harness_s(tiny):
    """Answers, choices and nats over the same items; tools/agreement.py prints it for larger samples."""
    from agreement import compare

    table = compare(tiny.paths.model("alpha"), 3).set_index("compared")
    assert len(table) == 5 and (table["items"] == 6).all()
    assert (table["items that differ"] == 0).all(), table
    assert (table["largest difference"] < 1e-3).all(), table


@needs_lm_eval
def test_unknown_tasks_are_named(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"task": "mine", "dataset_path": "json"}), encoding="utf-8")
    config = EvaluateConfig(lm_eval_tasks=["mine", "kvpipe_no_such_task"], lm_eval_folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"no task kvpipe_no_such_task in lm_eval .* or in"):
        harness.run_tasks(tmp_path, config, "cpu")


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "kvpipe\[lm-eval\]"'):
        harness.run_tasks(tmp_path, EvaluateConfig(lm_eval_tasks=["x"]), "cpu")
    with pytest.raises(ValueError, match="lm_eval_tasks is empty"):
        harness.run_tasks(tmp_path, EvaluateConfig(), "cpu")


def test_only_its_own_step_depends_on_the_harness_s_settings():
    minimal = {"student": "s", "models": {"s": {"source": "scratch", "architecture": {}}}, "arms": {"control": {}}}
    data = {"sources": [{"kind": "files", "task": "t", "train": "a", "validation": "a", "test": "a"}]}
    plain, more = (
        table(Dag(parse({**minimal, "data": data, "evaluate": {"lm_eval_tasks": tasks}})), Paths(Path("results")))
        for tasks in ([], ["arc_easy"])
    )
    cell = {"arm": "control", "seed": "0"}
    assert plain["evaluate"].depends(**cell) == more["evaluate"].depends(**cell)
    assert plain["lm_eval"].depends(**cell) != more["lm_eval"].depends(**cell)

"""Three and five teachers of as many families and tokenizers in one student: the laws of fusion, in whole cells."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import TEACHERS, build, config

from kvpipe.config import FUSIONS as KINDS
from kvpipe.experiment.paths import Paths
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import prepare, train_cell

NAMES = ("alpha", "beta", "gamma")
FUSIONS = {
    "mean": {},
    "fixed": {"weights": [0.5, 0.3, 0.2]},
    "task": {"weights": {"math": [0.6, 0.3, 0.1], "default": [0.2, 0.2, 0.6]}},
    "attention": {},
    "learnable": {"entropy": 0.01},
    "select": {},
}


def arms(names) -> dict:
    """An arm per fusion, its weights in the order of the names."""
    order = [NAMES.index(name) for name in names]
    made = {}
    for kind, more in FUSIONS.items():
        rows = more.get("weights", {})
        if isinstance(rows, list):
            table = [rows[i] for i in order]
        else:
            table = {task: [row[i] for i in order] for task, row in rows.items()}
        fuse = {**more, "kind": kind} | ({"weights": table} if table else {})
        made[f"{kind}-{'-'.join(names)}"] = {"base": "two", "set": {"teachers": list(names), "fuse": fuse}}
    return made


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The tiny experiment with a third teacher, and every fusion of the three in two orders."""
    overrides = {f"arms.{name}": arm for order in (NAMES, NAMES[::-1]) for name, arm in arms(order).items()}
    overrides |= {"train.steps": 3, "train.log_every": 1, "train.eval_every": 3}
    return build(tmp_path_factory.mktemp("three"), overrides, NAMES)


@pytest.fixture
def cell(work, tmp_path):
    def train(kind: str, names) -> tuple[list[dict], dict[str, torch.Tensor]]:
        arm = f"{kind}-{'-'.join(names)}"
        prepare(work, arm, log=lambda *_: None)
        train_cell(work, arm, 0, tmp_path / arm, tmp_path / f"{arm}-checkpoints", log=lambda *_: None)
        history = [json.loads(line) for line in (tmp_path / arm / "history.jsonl").read_text().splitlines()]
        return [line for line in history if "cross_entropy" in line], load_file(
            tmp_path / arm / "model" / "model.safetensors"
        )

    return train


@pytest.mark.parametrize("kind", FUSIONS)
def test_weights_sum_to_one_and_follow_the_teachers(cell, kind):
    steps, student = cell(kind, NAMES)
    turned_steps, turned = cell(kind, NAMES[::-1])
    seen = 0
    for line, other in zip(steps, turned_steps, strict=True):
        assert line["keys"] > 0 and line["values"] > 0
        for task in ("math", "code"):
            weights = [line.get(f"weight/{task}/{name}") for name in NAMES]
            if weights[0] is None:  # none of that task in the batch
                continue
            seen += 1
            assert sum(weights) == pytest.approx(1, abs=1e-5)
            assert [other[f"weight/{task}/{name}"] for name in NAMES] == pytest.approx(weights, abs=2e-3)
            if kind in ("fixed", "task"):
                table = FUSIONS[kind]["weights"]
                wanted = table if kind == "fixed" else table.get(task, table["default"])
                assert weights == pytest.approx(wanted, abs=0.02)
    assert seen
    for name, tensor in student.items():
        torch.testing.assert_close(turned[name], tensor, rtol=0, atol=2e-3, msg=f"{kind}: {name}")


def test_three_teachers_are_fitted_together(work):
    prepare(work, f"mean-{'-'.join(NAMES)}", log=lambda *_: None)
    (report,) = (work.paths.root / "projector").glob("alpha+beta+gamma.*.json")
    explained = json.loads(report.read_text())["explained_variance"]
    assert explained.keys() == set(NAMES)
    assert all(0 < share <= 1 for shares in explained.values() for kind in ("keys", "values") for share in shares[kind])


# ---------------------------------------------------------------- five, stored and live
FIVE = tuple(TEACHERS)
SETTINGS = {
    "fixed": {"weights": [0.3, 0.1, 0.2, 0.25, 0.15]},
    "task": {"weights": {"math": [0.3, 0.1, 0.2, 0.25, 0.15], "default": [0.1, 0.2, 0.3, 0.15, 0.25]}},
    "learnable": {"entropy": 0.01},
}


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """The tiny experiment with five teachers: loaders that store their caches, and loaders that run them live."""
    folder = tmp_path_factory.mktemp("five")
    overrides = {
        f"arms.five-{kind}": {
            "base": "two",
            "set": {"teachers": list(FIVE), "fuse": {"kind": kind, **SETTINGS.get(kind, {})}},
        }
        for kind in KINDS.settings
    }
    overrides |= {"train.steps": 3, "train.log_every": 1, "train.eval_every": 3, "store.dtype": "fp16"}
    stored = build(folder, overrides, FIVE)
    local = {f"models.{name}": {"source": "local", "path": str(folder / "teachers" / name)} for name in FIVE}
    live = Inputs(config(folder, local | overrides | {"store.mode": "live"}), Paths(folder / "live"))
    return {"stored": stored, "live": live}


def test_five_teachers_share_neither_family_nor_tokens(five):
    work = five["stored"]
    assert len({work.model_config(name).model_type for name in FIVE}) == len(FIVE)
    spans = [work.encoding(name, "train").spans for name in (*FIVE, "student")]
    assert len({len(span) for span in spans}) == len(spans)


@pytest.mark.parametrize(
    "kind", [kind if kind == "task" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS.settings]
)
def test_five_teachers_train_alike_stored_and_live(five, tmp_path, kind):
    found = {}
    for mode, work in five.items():
        arm, out = f"five-{kind}", tmp_path / mode
        prepare(work, arm, log=lambda *_: None)
        assert all(work.paths.store_index(name, "student").is_file() == (mode == "stored") for name in FIVE)
        train_cell(work, arm, 0, out, tmp_path / f"{mode}-checkpoints", log=lambda *_: None)
        lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
        found[mode] = [line for line in lines if "cross_entropy" in line]
    for line, other in zip(*found.values(), strict=True):
        assert line["keys"] > 0 and line["values"] > 0
        for task in ("math", "code"):
            weights = [line.get(f"weight/{task}/{name}") for name in FIVE]
            if weights[0] is not None:
                assert sum(weights) == pytest.approx(1, abs=1e-5)
                assert [other[f"weight/{task}/{name}"] for name in FIVE] == pytest.approx(weights, abs=2e-2)
        # rounding to fp16 in the store, in the fit too
        assert {name: other[name] for name in ("cross_entropy", "keys", "values")} == pytest.approx(
            {name: line[name] for name in ("cross_entropy", "keys", "values")}, rel=2e-2
        )

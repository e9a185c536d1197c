"""The fairness audit: each breach constructed, found, written and allowed by name."""

import json

import pandas as pd
import pytest
from tiny import build, config

from kvpipe.data.corpus import pretraining_records
from kvpipe.data.records import Record, read_records, write_records
from kvpipe.experiment.paths import Paths
from kvpipe.stats.audit import AuditFailure, audit

ARMS = {
    "control": {"role": "control"},
    "one": {"base": "control", "set": {"teachers": ["alpha"], "loss": {"keys": {}, "values": {}}}},
    "null": {"base": "one", "set": {"shuffle_teacher": True}},
}


def record(number: int, prompt: str, answer: str = "7", task: str = "math") -> Record:
    return Record(f"r{number}", task, prompt, f"because {number}", answer)


# ---------------------------------------------------------------- whole audits
@pytest.fixture
def fair(tmp_path):
    """(paths, check): a finished experiment in which all is fair, and the audit under more settings."""
    paths = Paths(tmp_path / "results")
    for number, split in enumerate(("train", "validation", "test")):
        paths.data(split).parent.mkdir(parents=True, exist_ok=True)
        write_records(paths.data(split), [record(10 * number + i, f"{split} asks {i}") for i in range(5)])
    for arm in ARMS:
        for seed in (0, 1):
            cost(paths, arm, seed)
            items(paths, arm, seed, ["a", "b", "c"])

    def check(overrides=None):
        settings = config(tmp_path, {"arms": ARMS} | (overrides or {}))
        return {c.name: c.status for c in audit(settings, paths, paths.root / "audit.json")}

    return paths, check


def cost(paths: Paths, arm: str, seed: int, **other) -> None:
    path = paths.cell(arm, seed) / "cost.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"steps": 30, "tokens": 10_000} | other))


def items(paths: Paths, arm: str, seed: int, ids: list[str]) -> None:
    paths.items(arm, seed).parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"id": ids}).to_parquet(paths.items(arm, seed))


def test_a_fair_experiment_passes(fair):
    paths, check = fair
    assert check() == dict.fromkeys(("leakage", "steps", "tokens", "items", "seeds"), "ok")
    written = json.loads((paths.root / "audit.json").read_text())["checks"]
    assert {c["name"] for c in written} == {"leakage", "steps", "tokens", "items", "seeds"}


def leak(paths):
    train = read_records(paths.data("train"))
    test = read_records(paths.data("test"))
    write_records(paths.data("test"), [*test, record(99, train[2].prompt, train[2].answer)])


BREACHES = {
    "leakage": (leak, ["r99 (same content)", "1 occur"]),
    "steps": (lambda p: cost(p, "one", 1, steps=29), ["[29, 30] optimizer steps in 6 cells"]),
    "tokens": (lambda p: cost(p, "null", 0, tokens=10_101), ["differ by 1.01% at most (allowed 1%)"]),
    "items": (lambda p: items(p, "one", 0, ["a", "b", "d"]), ["6 cells"]),
    "seeds": (lambda p: p.items("null", 1).unlink(), ["{'null': [0]}"]),
}


@pytest.mark.parametrize("name", BREACHES)
def test_every_breach_fails_after_it_is_written(fair, name):
    paths, check = fair
    make, words = BREACHES[name]
    make(paths)
    with pytest.raises(AuditFailure) as error:
        check()
    found = {c["name"]: c for c in json.loads((paths.root / "audit.json").read_text())["checks"]}
    assert {n: c["status"] for n, c in found.items()} == dict.fromkeys(found, "ok") | {name: "breach"}
    for word in words:
        assert word in str(error.value)
        assert word in found[name]["detail"]
    assert "audit.allow" in str(error.value)


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_that_is_allowed_is_reported_by_its_name_only(fair, name):
    paths, check = fair
    BREACHES[name][0](paths)
    assert check({"audit.allow": [name]})[name] == "allowed"
    other = next(n for n in BREACHES if n != name)
    with pytest.raises(AuditFailure):
        check({"audit.allow": [other]})


def test_one_percent_of_tokens_is_allowed(fair):
    paths, check = fair
    cost(paths, "null", 0, tokens=10_100)
    assert check()["tokens"] == "ok"
    with pytest.raises(AuditFailure, match="tokens"):
        check({"audit.tolerance": 0.009})


def test_no_cell_at_all_is_not_fair(tmp_path, fair):
    paths, check = fair
    for path in [*paths.root.glob("evaluate/*/*"), *paths.root.glob("train/*/*/cost.json")]:
        path.unlink()
    with pytest.raises(AuditFailure, match="seeds"):
        check()


def test_a_teachers_own_training_data_is_searched(tmp_path):
    """Where a teacher's recipe is ours, its pretraining examples are made again and compared with the test split."""
    work = build(tmp_path, {"arms": ARMS})
    for arm in ARMS:
        for seed in (0, 1):
            cost(work.paths, arm, seed)
            items(work.paths, arm, seed, ["a"])
    recipe = {"architecture": {"model_type": "llama"}, "examples": 40, "mixture": {"math": 1.0}}
    settings = config(tmp_path, {"arms": ARMS, "models.alpha.recipe": recipe})
    out = tmp_path / "audit.json"
    details = [c.detail for c in audit(settings, work.paths, out) if c.name == "leakage"]
    assert len(details) == 2
    assert "teacher alpha's training examples" in details[1]
    short, own = pretraining_records(settings.models["alpha"].recipe, settings.data)
    stolen = (short + own)[3]
    write_records(work.paths.data("test"), [*work.records("test"), stolen])
    with pytest.raises(AuditFailure, match=r"teacher alpha's training examples.*same content"):
        audit(settings, work.paths, out)

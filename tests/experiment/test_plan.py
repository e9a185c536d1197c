"""What depends on what: a change reaches the steps it concerns and no others."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from tiny import ARMS, config

from kvpipe.config import load, parse
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag, digest
from kvpipe.experiment.steps import table

SHIPPED = load(Path(__file__).parents[2] / "config" / "config.yaml")


@pytest.fixture
def shipped():
    return Dag(SHIPPED)


def changed(overrides) -> Dag:
    return Dag(parse(SHIPPED.model_dump(exclude_unset=True), overrides))


def params(dag: Dag) -> dict[tuple, str]:
    """Every param of every job; those of a fit under the names of its arms, those of a cell for the first seed."""
    out = {}
    for name, step in table(dag, Paths(Path("results"))).items():
        for job in step.jobs():
            names = [job["arm"]] if name == "train" else list(job.values())
            out[name, *names] = step.depends(**job)
    for arm, resolved in dag.arms.items():
        if dag.needs_fit(resolved):
            out["fit", arm] = out["fit", dag.fit_id(resolved)]
    return {key: value for key, value in out.items() if not (key[0] == "fit" and key[1] in dag.fits)}


def reached(overrides) -> set[str]:
    before, after = params(Dag(SHIPPED)), params(changed(overrides))
    found = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    return {"/".join(key if key[0] in ("train", "fit") else key[:1]) for key in found}


def arm_with(name, **more):
    entry = SHIPPED.arms[name].model_dump(exclude_unset=True)
    return {f"arms.{name}": entry | {"set": entry["set"] | {k.replace("__", "."): v for k, v in more.items()}}}


def test_params_are_json_and_repeat(shipped):
    assert params(shipped) == params(changed({}))
    assert all(json.loads(value) is not None for value in params(shipped).values())


# ---------------------------------------------------------------- fits
def test_arms_that_agree_in_the_fit_share_it(shipped):
    ids = {name: shipped.fit_id(arm) for name, arm in shipped.arms.items() if shipped.needs_fit(arm)}
    assert ids["exp5"] == ids["exp6"], "fusion comes after the fit"
    assert ids["full"] == ids["null-shuffled"], "so does what the arm trains on"
    alone = ["exp1", "exp2", "exp3", "exp4", "exp5", "full", "null-random", "full-joint", "misaligned"]
    assert len({ids[name] for name in alone}) == len(alone)
    assert set(shipped.fits) == set(ids.values())
    for name, fit in ids.items():
        assert shipped.fit_id(shipped.fit_arm(fit)) == fit
        assert fit.startswith("+".join(shipped.arms[name].teachers) + ".")
    assert not {"control", "null-control", "logit-kd", "relation"} & set(ids)


def test_an_unknown_fit_or_arm_is_named(shipped):
    with pytest.raises(KeyError, match=r"'nope'.*exp1"):
        shipped.arm("nope")
    with pytest.raises(KeyError, match=r"'nope'.*math"):
        shipped.fit_arm("nope")


def test_settings_of_training_do_not_touch_the_fit():
    for setting in ("loss.keys.weight", "loss.values.weight", "learning_rate_factor"):
        assert reached(arm_with("exp2", **{setting: 0.5})) == {"train/exp2", "report"}


# ---------------------------------------------------------------- what a change reaches
CHANGES = {
    "an arm's loss": (arm_with("exp3", loss__values__skip_sink=1), {"train/exp3", "report"}),
    "an arm's layers": (arm_with("exp3", layer__k=3), {"train/exp3", "fit/exp3", "report"}),
    "an arm's label": (
        {"arms.exp3": SHIPPED.arms["exp3"].model_dump(exclude_unset=True) | {"label": "other"}},
        {"report"},
    ),
    "a seed": ({"seeds": [101, 102, 103, 104, 105, 106]}, {"arm", "stats", "audit", "report"}),
    "resamples": ({"stats.resamples": 7}, {"stats"}),
    "the audit": ({"audit.tolerance": 0.5}, {"audit"}),
    "generation": ({"evaluate.max_new_tokens": 3}, {"evaluate", "untrained", "teacher_quality"}),
    "the context": ({"data.context": "strict"}, {"encode"}),
    "the title": ({"title": "other"}, {"report"}),
    "how a run is stored": ({"train.checkpoint_every": 3, "train.device": "cpu", "train.threads": 2}, set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_reaches_its_steps_only(name):
    overrides, expected = CHANGES[name]
    assert reached(overrides) == expected


def test_a_base_reaches_the_arms_that_are_built_on_it():
    found = {key for key in reached(arm_with("exp6", loss__values__distance="smooth_l1")) if key.startswith("train/")}
    assert found == {"train/exp6", "train/full", "train/null-shuffled", "train/null-random", "train/full-joint"}


def test_training_settings_reach_every_arm_and_no_store(shipped):
    found = reached({"train.steps": 5})
    assert found == {f"train/{arm}" for arm in shipped.arms}
    assert "layer_map" in reached({"train.batch_size": 5}), "whose reference student is trained"


def test_live_teachers_reach_the_arms_that_have_some():
    found = reached({"store.mode": "live"})
    assert found == {f"train/{name}" for name, arm in Dag(SHIPPED).arms.items() if arm.teachers}


def test_stores_of_needed_layers_depend_on_the_arms_layers():
    needed = {"store.layers": "needed"}
    before, after = params(changed(needed)), params(changed(needed | arm_with("exp3", layer__k=1)))
    assert {k for k in before if before[k] != after.get(k)} == {
        ("train", "exp3"),
        ("fit", "exp3"),
        ("teacher_kv", "math", "student"),
        ("report",),
    }


# ---------------------------------------------------------------- what an arm needs
def test_needs_of_the_tiny_arms(tmp_path):
    dag = Dag(config(tmp_path))
    assert dag.teachers == ["alpha", "beta"]
    assert [a for a in dag.arms if dag.needs_layer_map(dag.arms[a])] == ["cka"]
    assert dag.mapped_teachers == ["alpha", "beta"]
    assert [a for a in dag.arms if not dag.needs_fit(dag.arms[a])] == ["control", "logit", "relation"]
    assert [a for a in dag.arms if not dag.uses_store(dag.arms[a])] == ["control"]
    assert dag.cells == [(arm, seed) for arm in ARMS for seed in (0, 1)]
    live = Dag(config(tmp_path, {"store.mode": "live"}))
    assert not [a for a in live.arms if live.uses_store(live.arms[a])]


def test_models_that_depend_on_others(shipped, tmp_path):
    assert shipped.model_needs("math-random") == ["math"]
    assert shipped.model_needs("math") == []
    scratch = Dag(config(tmp_path))
    paths = Paths(tmp_path)
    steps = {m: table(scratch, paths)["model"].needs(model=m) for m in scratch.config.models}
    assert [m for m, needs in steps.items() if paths.data("train") in needs] == ["student"]
    assert shipped.model_source("math-random")["like_model"]["path"] == "config/embedded/math"


def test_paths_are_distinct_and_under_the_root(tmp_path):
    paths = Paths(tmp_path)
    found = [
        paths.model("a"),
        paths.data("train"),
        paths.store("a", "own"),
        paths.shard("a", "own", 3),
        paths.layer_map("a"),
        paths.projector("f"),
        paths.cell("a", 1),
        paths.checkpoints("a", 1),
        paths.items("a", 1),
        paths.teacher_quality("a"),
        paths.arm_table("a"),
        paths.stats,
        paths.costs,
    ]
    assert len(set(found)) == len(found)
    assert all(path.is_relative_to(tmp_path) for path in found)
    assert not paths.checkpoints("a", 1).is_relative_to(paths.cell("a", 1)), "whose files Snakemake deletes"


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})
    assert len(digest(1, 12)) == 12


# ---------------------------------------------------------------- the table
def test_every_file_that_a_step_reads_is_made_by_one_other(shipped, tmp_path):
    steps = table(shipped, Paths(tmp_path))
    makers = [path for step in steps.values() for path in step.files()]
    assert len(makers) == len(set(makers)), "no two jobs write one file"
    order = {path: number for number, step in enumerate(steps.values()) for path in step.files()}
    for number, step in enumerate(steps.values()):
        for job in step.jobs():
            for path in step.needs(**job):
                assert order[path] <= number, f"{path} is made by a later step"


def test_every_step_is_a_rule_and_its_function_is_there(shipped, tmp_path):
    rules = "".join(path.read_text() for path in (Path(__file__).parents[2] / "workflow" / "rules").glob("*.smk"))
    for name, step in table(shipped, Paths(tmp_path)).items():
        assert f"rule {name}:" in rules
        module, _, function = step.run.partition(":")
        assert callable(getattr(import_module(module), function))

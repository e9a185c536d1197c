"""Use without Snakemake: what is stale is made again, and nothing else; what is damaged is refused by name."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build

from kvpipe.align.layermap import layer_plan
from kvpipe.cache.store import Store
from kvpipe.config import Config, LayerConfig
from kvpipe.experiment.files import content_digest
from kvpipe.experiment.paths import Paths
from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.report.status import cell as cell_of
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.projectors import fitted
from kvpipe.steps.train import prepare
from kvpipe.train import checkpoint

BELOW = {"encode student", "layer_map alpha", "teacher_kv alpha", "fit"}
"""What reads the student's tokenizer; below alpha there is `encode alpha` in place of the student's."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All artefacts of an arm with one teacher, a layer map, a store and a fit."""
    root = tmp_path_factory.mktemp("made")
    arm = (
        {"role": "control"},
        {"base": "control", "set": {"teachers": ["alpha"], "loss": {"keys": {}, "values": {}}, "layer.kind": "cka"}},
    )
    work = build(root, {"arms": {"control": arm[0], "mine": arm[1]}}, teachers=("alpha",))
    prepare(work, "mine", log=[].append)
    return work


@pytest.fixture
def work(made, tmp_path):
    """A copy of them and of the teacher's own folder, which a test may change."""
    shutil.copytree(made.paths.root.parent, tmp_path / "x")
    values = made.config.model_dump(mode="json", exclude_unset=True)
    (tmp_path / "values.json").write_text(json.dumps(values))
    # paths are part of the settings: the copy takes the place of the first
    first = made.paths.root.parent
    first.rename(first.with_name("aside"))
    (tmp_path / "x").rename(first)
    yield Inputs(made.config, made.paths)
    shutil.rmtree(first)
    first.with_name("aside").rename(first)


def again(work: Inputs, **settings) -> set[str]:
    """What is made again, as a step and its model, with dotted settings (`__` for the dot) over the configuration."""
    values = work.config.model_dump(mode="json", exclude_unset=True)
    for key, value in settings.items():
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    said: list[str] = []
    prepare(Inputs(Config.model_validate(values), work.paths), "mine", log=said.append)
    return {"fit" if line.startswith("fit ") else " ".join(line.split(" …")[0].split()[:2]) for line in said}


def retrained(folder):
    """Other weights in the same files, of the same size."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})


def test_nothing_changed_makes_nothing(work):
    assert again(work) == set()


def test_results_that_are_named_otherwise_or_moved_are_as_they_were(work, monkeypatch):
    root = work.paths.root
    monkeypatch.chdir(root.parent)
    said: list[str] = []
    prepare(Inputs(work.config, Paths(Path(root.name))), "mine", log=said.append)
    shutil.copytree(root, root.parent / "moved")
    prepare(Inputs(work.config, Paths(root.parent / "moved")), "mine", log=said.append)
    assert said == []


def test_other_data_make_all_that_reads_them(work):
    # the student is from scratch: its tokenizer reads the training split
    assert again(work, data__seed=5) == {"data", "model student", "encode alpha", *BELOW}
    assert again(work, data__seed=5) == set()


def test_another_template_keeps_the_data(work):
    assert again(work, data__template={"answer": "{answer} ."}) == {"model student", "encode alpha", *BELOW}


def test_a_teacher_retrained_in_place_is_taken_anew(work):
    folder = work.paths.root.parent / "teachers" / "alpha"
    before = Store(work.paths.store("alpha", "student")).rows("keys")
    retrained(folder)
    assert again(work) == {"model alpha", "encode alpha", *BELOW} - {"encode student"}
    assert not torch.equal(Store(work.paths.store("alpha", "student")).rows("keys"), before)
    (copied,), (own,) = (list(f.glob("*.safetensors")) for f in (work.paths.model("alpha"), folder))
    assert copied.read_bytes() == own.read_bytes()
    assert again(work) == set()


def test_another_path_with_the_same_content_makes_the_model_alone_and_what_reads_its_manifest(work):
    shutil.copytree(work.paths.root.parent / "teachers" / "alpha", work.paths.root.parent / "other")
    found = again(work, models__alpha__path=str(work.paths.root.parent / "other"))
    assert "model alpha" in found and not found & {"data", "model student", "encode student"}


def test_layer_settings_and_the_fit_reach_what_follows_them(work):
    arm = work.config.arms["mine"].model_dump(exclude_unset=True)
    assert again(work, layer_map={"examples": 4, "warmup_steps": 2}) == {"layer_map alpha", "fit"}
    other = {**arm, "set": arm["set"] | {"fit.method": "random"}}
    assert again(work, layer_map={"examples": 4, "warmup_steps": 2}, arms__mine=other) == {"fit"}


def test_a_record_that_is_gone_makes_it_again(work):
    shutil.rmtree(work.paths.root / "made")
    assert again(work) == {"data", "model student", "model alpha", "encode alpha", *BELOW}


def test_a_retrained_cell_with_its_old_scores_is_not_done(tmp_path, made):
    paths = type(made.paths)(tmp_path)
    cost, items = paths.cost("mine", 0), paths.items("mine", 0)
    cost.parent.mkdir(parents=True), items.parent.mkdir(parents=True)
    scores = pd.DataFrame({"id": ["a"]})
    scores.attrs["model"] = "first"
    scores.to_parquet(items)
    for digest, state in (("first", "done"), ("second", "trained")):
        cost.write_text(json.dumps({"train_seconds": 1.0, "peak_memory_bytes": 1, "model": {"digest": digest}}))
        assert cell_of(paths, "mine", 0).state == state


# ---------------------------------------------------------------- damage
def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(byte ^ 255 for byte in content[-64:])
    path.write_bytes(bytes(content))


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def empty(path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_damaged_projector_is_named_with_its_fit(work, damage):
    arm = work.dag.arm("mine")
    layers = [Store(work.paths.store("alpha", "student")).layers]
    fitted(work, arm, layers)
    damage(work.paths.projector(work.dag.fit_id(arm)))
    with pytest.raises(ValueError, match=r"projector/alpha\S+safetensors is damaged.*run `kvpipe fit --fit alpha"):
        fitted(work, arm, layers)


def test_a_projector_of_another_teacher_is_refused(work):
    arm = work.dag.arm("mine")
    path = work.paths.projector(work.dag.fit_id(arm))
    save_file({name.replace("alpha", "beta"): tensor for name, tensor in load_file(path).items()}, path)
    document = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(document | {"sha256": content_digest(path)}))
    with pytest.raises(ValueError, match=r"does not fit the arm \['alpha'\]: tensors \['alpha/bias'"):
        fitted(work, arm, [Store(work.paths.store("alpha", "student")).layers])


@pytest.mark.parametrize("text", ["", "{}", "[]", "one row", "another number"])
def test_a_damaged_layer_map_is_named_with_its_command(work, text):
    path = work.paths.layer_map("alpha")
    document = json.loads(path.read_text())
    if text == "one row":
        document["similarity"]["keys"] = document["similarity"]["keys"][:1]
    elif text == "another number":
        document["similarity"]["values"][1][2] = 0.5
    path.write_text(json.dumps(document) if " " in text else text)
    with pytest.raises(ValueError, match=r"layer_map/alpha.json .*run `kvpipe layer-map --teacher alpha`"):
        layer_plan(LayerConfig(kind="cka"), 4, 3, path)


def test_a_layer_map_of_other_models_is_refused(work):
    with pytest.raises(ValueError, match="expected 3 × 5 layers"):
        layer_plan(LayerConfig(kind="cka"), 5, 3, work.paths.layer_map("alpha"))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"key": {"layers": [1]}, "shards": [3]}'])
def test_a_damaged_index_is_named_with_its_command(work, text):
    folder = work.paths.store("alpha", "student")
    (folder / "index.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"index.json is damaged.*kvpipe teacher-kv --teacher alpha --reading student`"
    ):
        Store(folder)


@pytest.mark.parametrize("exchange", ["names", "names and sizes", "names and entries"])
def test_swapped_shards_are_refused(tmp_path, exchange):
    work = build(tmp_path, {"store.shards": 2}, teachers=("alpha",))
    prepare(work, "one", log=[].append)
    folder = work.paths.store("alpha", "student")
    one, other = (work.paths.shard("alpha", "student", i) for i in (0, 1))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    index = json.loads((folder / "index.json").read_text())
    a, b = index["shards"]
    for key in {"names": [], "names and sizes": ["bytes"], "names and entries": ["bytes", "sha256"]}[exchange]:
        a[key], b[key] = b[key], a[key]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"shard-0000\d.safetensors is .*then run `kvpipe teacher-kv --teacher alpha"):
        Store(folder)


def test_weights_replaced_after_the_manifest_are_refused(work):
    folder = work.paths.model("alpha")
    load_model(folder)
    retrained(folder)
    load_tokenizer(folder)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or was replaced.*`kvpipe models --name alpha`"):
        load_model(folder)
    (folder / "MANIFEST.json").write_text("")
    with pytest.raises(ValueError, match=r"MANIFEST.json is damaged .*`kvpipe models --name alpha`"):
        load_model(folder)


def test_a_tokenizer_replaced_after_the_manifest_is_refused(work):
    flip(work.paths.model("alpha") / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json is damaged or was replaced"):
        load_tokenizer(work.paths.model("alpha"))


@pytest.mark.parametrize("change", [{"step": 100000}, {"spec": None}, "no spec", "a list", {"history": []}])
def test_an_edited_state_is_no_checkpoint(tmp_path, capsys, change):
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (4, 8):
        checkpoint.save(tmp_path, step, model, optimizer, [{"step": step}], {"tokens": step}, {"arm": "one"})
    path = tmp_path / "step-00000008" / "state.json"
    state = json.loads(path.read_text())
    if change == "no spec":
        del state["spec"]
    elif change == "a list":
        state = [state]
    else:
        state |= change
    path.write_text(json.dumps(state))
    found = checkpoint.resume(tmp_path, model, optimizer, {"arm": "one"})
    assert found is not None and found.step == 4
    assert "step-00000008" in capsys.readouterr().out

"""The model card says what the results say, and a published model is the one that was trained."""

import json
import math
import shutil
import warnings

import pandas as pd
import pytest
import yaml
from hub_server import HubServer
from tiny import ALPHA, build, save_teacher, values
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvpipe.cli import app as cli
from kvpipe.config import LockedFile, StatsConfig, TrainConfig
from kvpipe.evaluate.score import evaluate
from kvpipe.experiment.files import digest_of, folder_digest
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.provenance import reachable
from kvpipe.models.hub import HubError, is_model_file
from kvpipe.stats import tables
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.models import make_model
from kvpipe.steps.train import prepare, train_cell
from kvpipe.train import card


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Arm `two` trained; its first teacher is a hub model of a library, the second a folder with a card of its own."""
    folder = tmp_path_factory.mktemp("card")
    library = folder / "shared" / "owner" / "alpha"
    made = values(folder)["models"]
    save_teacher(library, "alpha", ALPHA, 0)
    files = {
        p.name: LockedFile(size=p.stat().st_size, digest=digest_of(p, "sha256")).model_dump()
        for p in library.iterdir()
        if is_model_file(p.name)
    }
    locked = {"owner/alpha@main": {"commit": "ab" * 20, "license": "apache-2.0", "files": files}}
    overrides = {
        "models": made | {"alpha": {"source": "hub", "repo": "owner/alpha"}},
        "lock": locked,
        "libraries": [str(folder / "shared")],
    }
    work = build(folder, overrides)
    (folder / "teachers" / "beta" / "README.md").write_text("---\nlicense: llama3\n---\n# beta\n")
    make_model(work, "beta")
    prepare(work, "two", log=lambda line: None)
    cell = work.paths.cell("two", 0)
    train_cell(work, "two", 0, cell, folder / "checkpoints", log=lambda line: None)
    return work, cell


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Two seeds of control and of `one`, trained, scored and put into tables."""
    folder = tmp_path_factory.mktemp("scored")
    work = build(folder, {"train.steps": 3, "train.eval_every": 3, "train.checkpoint_every": 9})
    for arm in ("control", "one"):
        prepare(work, arm, log=lambda line: None)
        for seed in (0, 1):
            train_cell(work, arm, seed, work.paths.cell(arm, seed), folder / "unused", log=lambda line: None)
            score_cell(work, arm, seed)
    tabulate(work)
    return work


@pytest.fixture
def evaluated(scored, tmp_path):
    """The same in a folder that a test may change."""
    shutil.copytree(scored.paths.root, tmp_path / "results")
    return Inputs(scored.config, Paths(tmp_path / "results"))


def score_cell(work, arm, seed):
    path = work.paths.items(arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    template, settings = work.config.data.template, work.config.evaluate
    table = evaluate(work.paths.cell(arm, seed) / "model", work.records("test"), template, settings, "cpu")
    table["correct"] = [(seed + i) % 2 == 0 for i in range(len(table))]
    table.to_parquet(path, index=False)


def tabulate(work):
    work.paths.arm_table("one").parent.mkdir(exist_ok=True)
    for arm in ("control", "one"):
        tables.arm_table(work.dag, work.paths, arm).to_csv(work.paths.arm_table(arm), index=False)
    arms = {name: work.config.arms[name] for name in ("control", "one")}
    dag = Dag(work.config.model_copy(update={"arms": arms}))
    tables.write_stats(dag, work.paths, None)


def results(work, seed=0):
    text = card.card(work.dag, work.paths, "one", work.paths.cell("one", seed))
    return text.split("## Results\n")[1].split("## Provenance")[0].strip()


def test_a_card_has_the_scores_of_its_own_model(evaluated):
    """Per item by hand: bits are nats of a task over its bytes, and tasks count alike."""
    for seed in (0, 1):
        items = pd.read_parquet(evaluated.paths.items("one", seed))
        expected = {task: d.nll.sum() / math.log(2) / d.bytes.sum() for task, d in items.groupby("task")}
        right = {task: d.correct.mean() for task, d in items.groupby("task")}
        means = pd.read_csv(evaluated.paths.stats / "arms.csv").set_index(["arm", "metric", "task"])["mean"]
        text = results(evaluated, seed)
        for name, key, found in (("bits per byte", "bits_per_byte", expected), ("accuracy, %", "accuracy", right)):
            found["all"] = sum(found.values()) / 2
            for task, value in found.items():
                factor = 100 if key == "accuracy" else 1
                own, mean = (factor * x for x in (value, means["one", key, task]))
                assert f"| {name} | {task} | {own:.4g} | {mean:.4g} (" in text
        assert "over 2 seeds (this model is one of them) and 5 items" in text and "Against control" in text


def test_a_card_has_no_scores_of_other_weights(evaluated):
    """A cell trained anew has none until it is scored and put into the tables anew; its sister keeps its own."""
    sister, before = results(evaluated, 1), results(evaluated)
    cell = evaluated.paths.cell("one", 0)
    train_cell(
        evaluated, "one", 5, cell, evaluated.paths.root / "unused", log=lambda line: None
    )  # other weights in its place
    cost = json.loads((cell / "cost.json").read_text())
    cost["provenance"]["seed"] = 0
    (cell / "cost.json").write_text(json.dumps(cost))
    digest = folder_digest(cell / "model")
    none = f"Not evaluated yet. The scores in the results are of other weights than these ({digest})."
    assert results(evaluated) == none and results(evaluated, 1) == sister
    with pytest.raises(ValueError, match=rf"seed0\.parquet has the scores of a model \w+, .* is {digest}: evaluate"):
        tabulate(evaluated)
    score_cell(evaluated, "one", 0)
    assert results(evaluated) == none, "the tables are the old ones"
    tabulate(evaluated)
    assert results(evaluated) not in (none, before) and "| bits per byte | all |" in results(evaluated)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_was_changed_has_no_scores_and_is_said(evaluated, name):
    path = evaluated.paths.cell("one", 0) / "model" / name
    path.write_bytes(path.read_bytes() + b" ")
    text = card.card(evaluated.dag, evaluated.paths, "one", path.parent.parent)
    assert "Not evaluated yet. The scores in the results are of other weights" in text
    assert "**Its files were changed after training**" in text and "Against control" not in text


def test_tables_without_digests_are_of_no_model(evaluated):
    """Made before scores carried one: nothing says which weights they are of."""
    for path in (evaluated.paths.arm_table("one"), evaluated.paths.stats / "arms.csv"):
        pd.read_csv(path).drop(columns=["model", "models"], errors="ignore").to_csv(path, index=False)
    assert results(evaluated).startswith("Not evaluated yet. The scores in the results are of other weights")


def test_scores_of_another_arm_are_refused(evaluated):
    """Two tables in each other's place."""
    one, control = evaluated.paths.items("one", 0), evaluated.paths.items("control", 0)
    first, second = one.read_bytes(), control.read_bytes()
    one.write_bytes(second), control.write_bytes(first)
    with pytest.raises(ValueError, match="has the scores of a model"):
        tabulate(evaluated)


def test_a_card_of_other_settings_is_refused(evaluated):
    """They are the configuration's, which has changed since."""
    changed = evaluated.config.model_copy(update={"train": TrainConfig(steps=3, learning_rate=1e-5)})
    with pytest.raises(ValueError, match="was trained under other settings than the configuration has now"):
        card.card(Dag(changed), evaluated.paths, "one", evaluated.paths.cell("one", 0))
    changed = evaluated.config.model_copy(update={"stats": StatsConfig(resamples=77)})
    assert "| bits per byte |" in card.card(Dag(changed), evaluated.paths, "one", evaluated.paths.cell("one", 0))


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def statistics(work):
    work.paths.stats.mkdir(exist_ok=True)
    model = folder_digest(work.paths.cell("two", 0) / "model")
    row = {
        "arm": "two",
        "task": "all",
        "n_seeds": 2,
        "n_items": 5,
        "low": 1.25,
        "high": 1.75,
        "models": f"{model} {'0' * 16}",
    }
    arms = [
        {**row, "metric": "bits_per_byte", "mean": 1.5},
        {**row, "metric": "train_seconds", "mean": 9.875},
        {**row, "arm": "one", "metric": "bits_per_byte", "mean": 7.125},
    ]
    contrast = {
        **row,
        "reference": "control",
        "metric": "bits_per_byte",
        "estimate": -0.375,
        "difference_low": -0.5,
        "difference_high": -0.25,
    }
    contrasts = [
        {**contrast, "p_dunnett": 0.0123},
        {**contrast, "reference": "one", "estimate": 6.5, "p_dunnett": 1.0},
        {**contrast, "metric": "log_perplexity", "ratio": 0.7, "ratio_low": 0.6, "ratio_high": 0.8, "p_dunnett": 0.01},
        {**contrast, "metric": "accuracy", "estimate": 0.25, "p_dunnett": 0.02},
    ]
    pd.DataFrame(arms).to_csv(work.paths.stats / "arms.csv", index=False)
    pd.DataFrame(contrasts).to_csv(work.paths.stats / "contrasts.csv", index=False)


def test_a_card_before_and_after_the_statistics(trained):
    work, cell = trained
    path = cell / "model" / "README.md"
    before = path.read_text()
    assert "Not evaluated yet." in before
    assert before == card.card(work.dag, work.paths, "two", cell), "written at the end of training"
    statistics(work)
    after = card.write_card(work.dag, work.paths, "two", cell).read_text()
    assert "| bits per byte | all | – | 1.5 (1.25, 1.75) |" in after
    assert "| bits per byte | all | -0.375 (-0.5, -0.25) | 0.0123 |" in after
    assert "| perplexity, per token | all | 0.7 × (0.6, 0.8) | 0.01 |" in after
    assert "| accuracy, % | all | +25 (-50, -25) | 0.02 |" in after
    assert not [words for words in ("Not evaluated", "9.875", "7.125", "6.5") if words in after]
    (work.paths.stats / "arms.csv").unlink()
    (work.paths.stats / "contrasts.csv").unlink()
    path.write_text(before)


def test_a_card_says_where_it_comes_from(trained):
    work, cell = trained
    text = card.card(work.dag, work.paths, "two", cell)
    assert f"| teacher 1 | alpha | owner/alpha at {'ab' * 20} | apache-2.0 |" in text
    assert "| teacher 2 | beta | local folder beta | llama3 |" in text
    head = front_matter(text)
    assert (head["license"], head["license_name"]) == ("other", card.SEVERAL), "both are carried over"
    assert head["library_name"] == "transformers" and "base_model" not in head, "a student from scratch has none"
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["teachers"] == ["alpha", "beta"] and settings["fit"]["method"] == "joint_pca"
    cost = json.loads((cell / "cost.json").read_text())
    assert f"{cost['steps']} steps, {cost['tokens']:,} student tokens" in text
    assert cost["provenance"]["config_hash"] in text and "| train | 15 math, 13 code |" in text
    assert str(work.paths.root.parent) not in text, "no path of this machine"


def test_a_card_names_the_commit_of_its_data(trained):
    work, cell = trained
    path = work.paths.data("train").parent / "sources.json"
    before = path.read_text()
    document = json.loads(before)
    for origin in document["sources"]:
        if origin["task"] == "math":
            origin["commit"] = "cd" * 20
    path.write_text(json.dumps(document))
    try:
        text = card.card(work.dag, work.paths, "two", cell)
    finally:
        path.write_text(before)
    assert f"- math: embedded at {'cd' * 20}\n- code: embedded\n" in text


def cell_of(arm, cell, folder):
    """A cell's record, as if it had been trained under another arm."""
    cost = json.loads((cell / "cost.json").read_text())
    cost["provenance"]["arm"], cost["settings"] = arm, None
    (folder / "model").mkdir(exist_ok=True)
    (folder / "cost.json").write_text(json.dumps(cost))
    return folder


def test_a_cell_has_the_card_of_its_own_arm_only(trained, hub, tmp_path):
    _, cell = trained
    before = (cell / "model" / "README.md").read_text()
    for words in (["card"], ["publish", "--repo", "me/other"]):
        done = command(trained, tmp_path, *words, "--arm", "control", "--cell", str(cell))
        assert done.exit_code == 1 and "was trained under the arm 'two': --arm two" in str(done.exception)
    assert (cell / "model" / "README.md").read_text() == before and not hub.repos


def test_one_licence_is_named_and_control_has_none(trained, tmp_path):
    work, cell = trained
    assert (
        front_matter(card.card(work.dag, work.paths, "one", cell_of("one", cell, tmp_path)))["license"] == "apache-2.0"
    )
    control = card.card(work.dag, work.paths, "control", cell_of("control", cell, tmp_path))
    assert "license" not in front_matter(control) and "carry over" not in control


def test_words_of_the_card_train_nothing_again():
    assert "kvpipe.train.card" not in reachable("kvpipe.train.trainer")
    assert "kvpipe.models.hub" not in reachable("kvpipe.train.trainer")


# ---------------------------------------------------------------- the hub
@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The real client in this process, talking to the local hub."""
    from huggingface_hub import constants

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", server.TOKEN)
        yield server


def command(trained, tmp_path, *arguments):
    work, _ = trained
    path = tmp_path / "config.json"
    path.write_text(work.config.model_dump_json(exclude_unset=True))
    files = ["--config", str(path), "--results", str(work.paths.root)]
    return CliRunner().invoke(cli.app, [*arguments, *files])


def test_publish_pushes_the_model_with_its_card_of_today(trained, hub, tmp_path):
    work, cell = trained
    before = (cell / "model" / "README.md").read_text()
    statistics(work)
    done = command(trained, tmp_path, "publish", "--arm", "two", "--repo", "me/student")
    assert done.exit_code == 0, done.output + repr(done.exception)
    repo = hub.repos["models", "me/student"]
    assert repo.private
    files = repo.commits[repo.refs["main"]]
    assert set(files) == {p.name for p in (cell / "model").iterdir() if not p.name.startswith(".")}
    assert files["model.safetensors"] == (cell / "model" / "model.safetensors").read_bytes()
    assert "-0.375" in files["README.md"].decode()
    assert (cell / "model" / "README.md").read_text() == before, "the results are left as they are"
    assert hub.TOKEN not in done.output
    again = command(trained, tmp_path, "publish", "--arm", "two", "--repo", "me/student")
    assert again.exit_code == 0 and len(repo.commits) == 3, "one commit each, after the empty one"
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in files.items():
        (copy / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(copy)


def test_publish_says_what_is_missing(trained, hub, tmp_path, monkeypatch):
    work, cell = trained
    with pytest.raises(FileNotFoundError, match=r"no trained model there.*--arm one"):
        card.publish(work.dag, work.paths, "one", work.paths.cell("one", 0), "me/student")
    monkeypatch.setenv("HF_TOKEN", "hf_a_wrong_one")
    with pytest.raises(HubError, match="refuses the token"):
        card.publish(work.dag, work.paths, "two", cell, "me/student")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="set HF_TOKEN"):
        card.publish(work.dag, work.paths, "two", cell, "me/student")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        card.publish(work.dag, work.paths, "two", cell, "me/student")
    assert not hub.repos


def test_the_front_matter_is_what_the_hub_reads(trained):
    from huggingface_hub import ModelCard

    work, cell = trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = ModelCard(card.card(work.dag, work.paths, "two", cell))
    assert loaded.data.pipeline_tag == "text-generation" and "kvpipe" in loaded.data.tags

"""Training without a configuration file: folders and a file of records in, a student out."""

import json
import re
import shutil

import pandas as pd
import pytest
from hub_server import HubServer
from tiny import ALPHA, BETA, save_teacher
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kvpipe.cli import app as cli
from kvpipe.config import DataConfig
from kvpipe.data.build import build
from kvpipe.data.corpus import generate
from kvpipe.experiment.sizes import count_parameters
from kvpipe.steps.direct import ARM, experiment
from kvpipe.steps.forecast import forecast
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.make import make


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two teachers whose folders have the same name, a student with weights, 40 records."""
    root = tmp_path_factory.mktemp("direct")
    save_teacher(root / "a" / "expert", "alpha", ALPHA, 0)
    save_teacher(root / "b" / "expert", "beta", BETA, 1)
    save_teacher(
        root / "student", "alpha", ALPHA | {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 6}, 2
    )
    records = generate("math", "train", 40, 1, 0)
    rows = [{"prompt": r.prompt, "reasoning": r.reasoning, "answer": r.answer} for r in records]
    (root / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def command(place, out, *more):
    arguments = ["train", "--teacher", place / "a" / "expert", "--student", place / "student"]
    arguments += ["--data", place / "records.jsonl", "--out", out, "--set", "train.steps=4", *more]
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_a_student_from_folders_and_a_file(place, tmp_path):
    out = tmp_path / "student"
    done = command(place, out, "--set", "arms.distil.set.loss.keys=null")
    assert done.exit_code == 0, done.output + repr(done.exception)
    AutoModelForCausalLM.from_pretrained(out / "model")
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert any("values" in line and "keys" not in line for line in lines), "the value term alone"
    assert "expert" in (out / "model" / "README.md").read_text()
    (made,) = (out / "artefacts").iterdir()
    sizes = {
        split: len(pd.read_parquet(made / "data" / f"{split}.parquet")) for split in ("train", "validation", "test")
    }
    assert sizes == {"train": 36, "validation": 2, "test": 2}
    # card and publish know the cell by its folder
    written = (out / "model" / "README.md").read_text()
    (out / "model" / "README.md").unlink()
    shown = CliRunner().invoke(cli.app, ["card", "--arm", ARM, "--cell", str(out)])
    assert shown.exit_code == 0, repr(shown.exception)
    assert (out / "model" / "README.md").read_text() == written
    # a second run finds the artefacts; its control is the same student alone
    again = command(place, out, "--arm", "control")
    assert again.exit_code == 0 and "KV of" not in again.output and "data …" not in again.output
    assert "k" not in json.loads((out / "history.jsonl").read_text().splitlines()[-2])


def test_a_cell_is_scored_and_published_from_its_folder(place, tmp_path, monkeypatch):
    out = tmp_path / "student"
    assert command(place, out, "--arm", "control").exit_code == 0
    monkeypatch.chdir(tmp_path)  # no config/config.yaml here
    scored = CliRunner().invoke(cli.app, ["evaluate", "--cell", str(out), "--out", "scores.parquet"])
    assert scored.exit_code == 0, scored.output + repr(scored.exception)
    table = pd.read_parquet("scores.parquet")
    assert f"test: {len(table)} items, " in scored.output and table.nll.gt(0).all()
    assert CliRunner().invoke(cli.app, ["evaluate", "--out", "scores.parquet"]).exit_code == 2
    with HubServer() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        done = CliRunner().invoke(cli.app, ["publish", "--arm", "control", "--cell", str(out), "--repo", "me/student"])
        assert done.exit_code == 0, done.output + repr(done.exception)
        repo = hub.repos["models", "me/student"]
        files = repo.commits[repo.refs["main"]]
    assert files["model.safetensors"] == (out / "model" / "model.safetensors").read_bytes()
    assert "local folder student" in files["README.md"].decode() and str(place) not in files["README.md"].decode()


def test_a_folder_with_a_dot_can_be_set(place, tmp_path):
    shutil.copytree(place / "a" / "expert", tmp_path / "TinyLlama-1.1B")
    config, _ = experiment(
        [tmp_path / "TinyLlama-1.1B"],
        place / "student",
        place / "records.jsonl",
        tmp_path,
        ["models.TinyLlama-1-1B.load.dtype=bf16"],
    )
    assert config.models["TinyLlama-1-1B"].load.dtype == "bf16"


def test_several_teachers_and_other_inputs(place, tmp_path):
    teachers = [place / "a" / "expert", place / "b" / "expert"]
    config, paths = experiment(teachers, place / "student", place / "records.jsonl", tmp_path)
    assert config.arm(ARM).teachers == ["expert", "expert-2"]
    assert [config.models[name].path for name in config.arm(ARM).teachers] == [str(t) for t in teachers]
    assert config.arm(ARM).fit.method == "ridge" and config.arm("control").teachers == []
    _, alone = experiment(teachers[:1], place / "student", place / "records.jsonl", tmp_path)
    assert alone.root != paths.root, "artefacts of other inputs lie elsewhere"
    other = tmp_path / "other.jsonl"
    other.write_text(
        (place / "records.jsonl").read_text() + "\n".join((place / "records.jsonl").read_text().splitlines()[:1])
    )
    assert experiment(teachers, place / "student", other, tmp_path)[1].root != paths.root


def test_columns_that_are_there_are_read(place, tmp_path):
    path = tmp_path / "plain.parquet"
    pd.DataFrame({"prompt": [f"{i} + 1 =" for i in range(40)], "answer": [str(i + 1) for i in range(40)]}).to_parquet(
        path
    )
    config, paths = experiment([place / "a" / "expert"], place / "student", path, tmp_path)
    assert isinstance(config.data, DataConfig)
    build(config.data, paths.root)
    assert pd.read_parquet(paths.root / "test.parquet").answer.tolist() == ["39", "40"]


def test_a_column_that_the_first_row_lacks_is_read(place, tmp_path):
    rows: list[dict] = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(40)]
    rows[3]["reasoning"], rows[5]["teacher_reasoning"] = "one more than 3", "count from 5"
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, paths = experiment([place / "a" / "expert"], place / "student", path, tmp_path)
    build(config.data, paths.root)
    train = pd.read_parquet(paths.root / "train.parquet")
    assert train.reasoning.tolist() == ["", "", "", "one more than 3"] + [""] * 32
    assert train.teacher_reasoning.dropna().tolist() == ["count from 5"]


def test_a_column_of_the_last_rows_alone_is_read(place, tmp_path):
    rows: list[dict] = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(40)]
    rows[39]["reasoning"] = "one more than 39"
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, paths = experiment([place / "a" / "expert"], place / "student", path, tmp_path)
    build(config.data, paths.root)
    assert pd.read_parquet(paths.root / "test.parquet").reasoning.tolist() == ["", "one more than 39"]


@pytest.mark.parametrize("count", [20, 23, 25, 30, 50])
def test_every_part_of_a_small_file_has_rows(place, tmp_path, count):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1 =", "answer": str(i)}) + "\n" for i in range(count)))
    given = [place / "a" / "expert"], place / "student", path, tmp_path
    config, paths = experiment(*given, overrides=["train.batch_size=4"])
    build(config.data, paths.root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": "nowhere"}, "nowhere is neither a model folder nor a hub id"),
        ({"data": "questions.jsonl"}, "no column prompt, answer \\(has question\\); rename the columns"),
        ({"data": "empty.jsonl"}, "empty.jsonl has no rows"),
        ({"data": "five.jsonl"}, "five.jsonl has 5 rows; a tenth is kept for validation and test: give 20 or more"),
        (
            {"overrides": ["train.batch_size=37"]},
            "36 rows to train on are fewer than train.batch_size, 37; give more or --set train.batch_size=36",
        ),
        ({"overrides": ["train.stepps=1"]}, "train.stepps: unknown key; did you mean 'steps'"),
    ],
)
def test_mistakes_are_named(place, tmp_path, change, message):
    (tmp_path / "questions.jsonl").write_text('{"question": "1 + 1"}\n' * 20)
    (tmp_path / "five.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n' * 5)
    (tmp_path / "empty.jsonl").write_text("")
    arguments = {"teachers": [place / "a" / "expert"], "student": place / "student", "data": place / "records.jsonl"}
    arguments |= {"out": tmp_path} | {k: tmp_path / v if k != "overrides" else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        experiment(**arguments)


@pytest.mark.parametrize("left_out", ["--student", "--data"])
def test_options_that_go_together(place, tmp_path, left_out):
    given = {"--student": place / "student", "--data": place / "records.jsonl"}
    rest = [str(part) for name, value in given.items() if name != left_out for part in (name, value)]
    done = CliRunner().invoke(cli.app, ["train", "--teacher", str(place / "a" / "expert"), *rest])
    assert done.exit_code == 2 and "--teacher goes with" in done.output


@pytest.mark.parametrize("more", [[], ["--student", "s", "--data", "d", "--out", "o"], ["--arm", "one", "--data", "d"]])
def test_neither_an_arm_nor_a_teacher(tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)  # usage comes first, whether there is a configuration or not
    done = CliRunner().invoke(cli.app, ["train", *more])
    assert done.exit_code == 2 and "give either --arm, or" in done.output


def test_a_comparison_says_what_it_will_cost_and_ends_with_a_table_and_a_report(place, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "run"
    done = command(place, out, "--compare", "--set", "seeds=[4, 7]", "--set", "train.batch_size=8")
    assert done.exit_code == 0, done.output + repr(done.exception)
    said = done.output
    plan, rest = said.split("About what it will cost")
    for words in ("teachers expert → student", "keys × 1, values × 1;", "4 cells (arm, seed)", "4 steps of 8 examples"):
        assert words in plan, words
    before, after = rest.split("Test split: 2 items, 2 seeds")
    assert "expert reads" in before and "4 × 4 steps" in before and "step 4/4" in before
    assert re.search(r"(?s)bits per byte.*?(better|worse|undecided)", after), after
    assert "</html>" in (out / "report.html").read_text() and f"report: {out / 'report.html'}" in said
    AutoModelForCausalLM.from_pretrained(re.findall(r"student: (\S+)", said)[-1])


def test_a_preset_is_named_instead_of_a_file(place, tmp_path):
    given = [place / "a" / "expert"], place / "student"
    config, paths = experiment(*given, "gsm8k[:2000]", tmp_path)
    (source,) = config.data.sources
    assert (source.preset, source.train, source.validation, source.test) == (
        "gsm8k", "train[:2000]", "train[95%:]", "test"
    )  # fmt: skip
    assert config.evaluate.of("gsm8k").scorer == "number"
    assert experiment(*given, "gsm8k", tmp_path)[1].root != paths.root
    assert experiment(*given, "mbpp", tmp_path)[0].evaluate.of("mbpp").scorer == "none", "runs no programs"
    with pytest.raises(ValueError, match=r"--data gsmk8: neither a file nor a preset; did you mean 'gsm8k'\?"):
        experiment(*given, "gsmk8", tmp_path)


def test_the_forecast_counts_what_is_trained_and_read(place, tmp_path):
    """Operations against a count by hand; a store that is there is not read again."""
    config, paths = experiment([place / "a" / "expert"], place / "student", place / "records.jsonl", tmp_path)
    inputs = Inputs(config, paths)
    make(inputs, [path for step in ("data", "model") for path in inputs.steps[step].files()], log=lambda *_: None)
    table = forecast(inputs, [("distil", 0), ("control", 0)], scored=False)
    cells = {
        name: list(column.cells) for name, column in zip(("step", "how", "operations"), table.columns, strict=False)
    }
    assert cells["step"] == ["expert reads", "training", "all"]
    assert all(float(cell.removesuffix(" GB")) > 0.5 for cell in table.columns[5].cells), "of the process as a whole"
    parameters = count_parameters(paths.model("student"))
    tokens = float(cells["how"][1].split(", ", 1)[1].removesuffix(" tokens").replace(",", ""))
    assert float(cells["operations"][1]) == pytest.approx(6 * parameters * tokens, rel=0.06)
    lengths = inputs.student_tokenizer(pd.read_parquet(paths.data("train")).prompt.tolist())["input_ids"]
    assert tokens > 2 * config.train.steps * config.train.batch_size * min(map(len, lengths))
    alone = forecast(inputs, [("control", 0)], scored=False)
    assert list(alone.columns[0].cells) == ["training", "all"], "control reads no teacher"

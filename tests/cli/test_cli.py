"""The command line: every subcommand, and one clear message for what a user can mend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from tiny import build, values
from typer.main import get_command
from typer.testing import CliRunner

from kvpipe.cli import app as cli

CONTRACT = [
    "doctor",
    "models",
    "data",
    "teacher-kv",
    "layer-map",
    "fit",
    "train",
    "evaluate",
    "stats",
    "report",
    "align",
]
COMMANDS = sorted(get_command(cli.app).commands)


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def files(tmp_path):
    """--config and --results of the tiny experiment, not yet begun."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values(tmp_path)))
    return ["--config", str(path), "--results", str(tmp_path / "results")]


def fails(capsys, monkeypatch, *arguments: str) -> str:
    """Run as the entry point does; what is printed to stderr."""
    monkeypatch.setattr(sys, "argv", ["kvpipe", *arguments])
    monkeypatch.delenv("KVPIPE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_the_contract_names_are_there():
    assert set(CONTRACT) <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_subcommand(name):
    shown = invoke(name, "--help")
    assert shown.exit_code == 0
    assert "Usage" in shown.output
    options = {option for parameter in get_command(cli.app).commands[name].params for option in parameter.opts}
    if name not in ("align", "config", "init", "recipes"):
        assert {"--config", "--set"} <= options


def test_no_arguments_show_the_help():
    shown = invoke()
    assert all(name in shown.output for name in CONTRACT)


def test_the_help_tells_what_people_use_from_what_the_rules_call():
    groups = {command.rich_help_panel for command in get_command(cli.app).commands.values()}
    assert groups == {"Use", "Steps, called by the rules"}
    shown = invoke("--help").output
    assert shown.index(" doctor ") < shown.index("Steps, called by the rules") < shown.index(" teacher-kv ")


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepps=3", ["train.stepps", "steps"]),
        ("train.steps=many", ["train.steps"]),
        ("arms.two.base=onee", ["arms.two.base", "onee", "did you mean 'one'"]),
        ("nothing", ["--set", "dotted.key=value"]),
        ("seeds=[1", ["--set", "seeds=[1"]),
    ],
)
def test_a_wrong_setting_is_one_message(files, capsys, monkeypatch, override, words):
    said = fails(capsys, monkeypatch, "data", *files, "--set", override)
    assert said.startswith("ConfigError: ")
    for word in words:
        assert word in said


def test_a_missing_configuration_is_named(capsys, monkeypatch, tmp_path):
    said = fails(capsys, monkeypatch, "data", "--config", str(tmp_path / "nope.yaml"))
    assert "nope.yaml: no such configuration file; name yours with --config" in said
    assert said.startswith("FileNotFoundError") and "Errno" not in said


def test_without_hub_models_no_lock_is_written(files, tmp_path):
    done = invoke("lock", *files)
    assert done.exit_code == 0 and "nothing to lock" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("command", ["train", "fit", "arm"])
def test_an_unknown_arm_is_named_with_the_known_ones(files, capsys, monkeypatch, command):
    said = fails(capsys, monkeypatch, command, *files, "--arm", "exp9")
    assert "no arm 'exp9'" in said
    assert "shuffled" in said


@pytest.mark.parametrize("command", [("models", "--name"), ("layer-map", "--teacher"), ("teacher-kv", "--teacher")])
def test_an_unknown_model_is_named_with_the_known_ones(files, capsys, monkeypatch, command):
    said = fails(capsys, monkeypatch, command[0], *files, command[1], "gamma")
    assert "gamma" in said
    assert "alpha" in said


def test_a_step_whose_inputs_are_not_there_says_what_to_run_before_it(files, capsys, monkeypatch, tmp_path):
    """In order; torch is not imported for it."""
    said = fails(capsys, monkeypatch, "teacher-kv", *files, "--teacher", "alpha")
    order = ["kvpipe models --name alpha", "kvpipe models --name student", "kvpipe data", "kvpipe encode --model alpha"]
    first, *_ = said.splitlines()
    assert (
        first.startswith("FileNotFoundError: ")
        and "is missing: run `kvpipe " in first
        and "kvpipe prepare --arm" in first
    )
    assert all(command in first for command in order), first
    assert first.index("`kvpipe data`") < first.index("`kvpipe models --name student`"), (
        "a student from scratch reads texts"
    )
    build(tmp_path)
    assert invoke("teacher-kv", *files, "--teacher", "alpha").exit_code == 0
    (tmp_path / "results/models/alpha/MANIFEST.json").unlink()
    said = fails(capsys, monkeypatch, "layer-map", *files, "--teacher", "alpha")
    assert "results/models/alpha/MANIFEST.json is missing: run `kvpipe models --name alpha` first\n" in said


def test_several_configurations_are_laid_over_each_other(files, tmp_path):
    path = tmp_path / "over.yaml"
    path.write_text(
        "data: {sources: [{kind: embedded, task: math, train: 3, validation: 2, test: 1, difficulty: 1}]}\n"
        "arms: {task: {set: {fuse.weights: {math: [0.7, 0.3]}}}}\n"  # instead of a row for each of two tasks
    )
    assert invoke("data", *files, "--config", str(path)).exit_code == 0
    assert len(pd.read_parquet(tmp_path / "results" / "data" / "train.parquet")) == 3


def test_a_full_disk_is_no_traceback(files, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "results/data")

    monkeypatch.setattr("kvpipe.steps.data.build", full)
    assert "No space left on device" in fails(capsys, monkeypatch, "data", *files)


def test_a_missing_extra_is_no_traceback(files, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["--model", "m", "--out", "o", "--config", files[1], "--set", "evaluate.lm_eval_tasks=[arc_easy]"]
    assert 'pip install "kvpipe[lm-eval]"' in fails(capsys, monkeypatch, "lm-eval", *arguments)


def test_the_traceback_is_there_on_request(files, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kvpipe", "data", *files, "--set", "title=[1"])
    monkeypatch.setenv("KVPIPE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="title"):
        cli.main()


# ---------------------------------------------------------------- steps
def test_align_prints_json(tiny):
    folders = [str(tiny.paths.model(name)) for name in ("alpha", "student")]
    arguments = ["align", "--src-tokenizer", folders[0], "--dst-tokenizer", folders[1], "--text", "1 + 2 = «3» 🙂"]
    shown = invoke(*arguments, "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.output)
    assert found
    for_people = invoke(*arguments)
    assert for_people.exit_code == 0
    assert "🙂" in for_people.output or "F0" in for_people.output


def test_doctor_prints_findings_and_fails_with_them(files, tmp_path):
    out = tmp_path / "doctor.json"
    shown = invoke("doctor", *files, "--json", "--out", str(out))
    assert shown.exit_code == 1, "the teachers are not there"
    found = json.loads(shown.output)["findings"]
    assert found == json.loads(out.read_text())["findings"]
    assert {f["status"] for f in found if f["name"].startswith("model ")} == {"would fail"}
    assert "would fail  model alpha" in invoke("doctor", *files).output


def test_steps_in_order_without_snakemake(tiny, tmp_path):
    """Data to statistics by the command line alone, into folders of its own."""
    path = tmp_path / "config.yaml"
    arms = {name: entry for name, entry in values(tmp_path)["arms"].items() if name in ("control", "one")}
    settings = values(tiny.paths.root.parent) | {"arms": arms, "seeds": [0]}
    path.write_text(yaml.safe_dump(settings))
    results = tmp_path / "results"
    files = ["--config", str(path), "--results", str(results)]

    def step(*arguments):
        shown = invoke(*arguments[:1], *files, *arguments[1:])
        assert shown.exit_code == 0, f"{arguments}: {shown.output} {shown.exception!r}"
        return shown.output

    for arm in arms:
        step("train", "--arm", arm, "--set", "train.steps=4")
        model = results / "train" / arm / "seed0" / "model"
        step("evaluate", "--model", str(model), "--out", str(results / "evaluate" / arm / "seed0.parquet"))
        step("arm", "--arm", arm)
    step("untrained", "--out", str(results / "evaluate" / "untrained.parquet"))
    step("stats", "--untrained", str(results / "evaluate" / "untrained.parquet"))
    assert "ok  items" in step("audit")
    assert "2 of 2 cells done" in step("status")
    header = (results / "stats" / "contrasts.csv").read_text().splitlines()[0]
    assert header.startswith("arm,reference,metric,task,estimate,low,high,p,")
    step("train", "--arm", "one", "--set", "train.steps=2", "--out", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "model" / "model.safetensors").is_file()


def test_the_untrained_student_is_scored_on_the_configured_device(files, tmp_path, monkeypatch):
    """`meta` stands for a GPU."""
    build(tmp_path)
    seen = []

    def scored(model, *arguments, **more):
        seen.append({parameter.device.type for parameter in model.parameters()})
        return pd.DataFrame()

    monkeypatch.setattr("kvpipe.evaluate.score.evaluate_model", scored)
    monkeypatch.setattr("kvpipe.experiment.device.resolve_device", {"cuda": "meta"}.__getitem__)
    shown = invoke("untrained", *files, "--set", "train.device=cuda", "--out", str(tmp_path / "untrained.parquet"))
    assert shown.exit_code == 0, shown.output
    assert seen == [{"meta"}]


def test_as_a_module(files):
    command = [sys.executable, "-m", "kvpipe", "data", *files, "--set", "train.stepps=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--arm", "one", "--out"],
        ["train", "--arm", "one", "--out", "x"],
        ["evaluate", "--model", "m", "--out", "x.parquet"],
        ["untrained", "--out", "x.parquet"],
        ["report", "--out", "x.html"],
    ],
    ids=" ".join,
)
def test_an_output_below_a_file_is_refused_at_once(files, tmp_path, command):
    (tmp_path / "taken").write_text("")
    *command, name = [*command, ""] if command[-1] == "--out" else command
    done = invoke(*command, str(tmp_path / "taken" / name), *files)
    assert done.exit_code == 2 and "is a file, not a folder" in " ".join(done.output.replace("│", "").split())
    assert not (tmp_path / "results").exists()


def test_in_an_image_a_stopped_cell_ends_without_pythons_own_end(tmp_path, monkeypatch):
    """The signal has ended the image's file system too: what Python would still import is gone."""
    ended = []
    monkeypatch.setattr("kvpipe.steps.train.make_cell", lambda *_, **__: sys.exit(75))
    monkeypatch.setattr(os, "_exit", ended.append)
    for name, expected in (("APPTAINER_CONTAINER", [75]), ("NOTHING", [])):
        ended.clear()
        monkeypatch.delenv("APPTAINER_CONTAINER", raising=False)
        monkeypatch.setenv(name, "image.sif")
        done = CliRunner().invoke(
            cli.app, ["train", "--arm", "control", "--config", str(Path(__file__).parents[2] / "config/config.yaml")]
        )
        assert done.exit_code == 75 and ended == expected

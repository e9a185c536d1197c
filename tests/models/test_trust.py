"""Code that comes with a model runs where the configuration says `trust_remote_code: true`, and no file can say so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ALPHA, build, save_teacher, values
from typer.testing import CliRunner

from kvpipe.cli import app as cli
from kvpipe.config import LockedFile, parse
from kvpipe.data import build as data
from kvpipe.experiment.files import digest_of
from kvpipe.experiment.paths import Paths
from kvpipe.models.folders import load_config, load_model, load_tokenizer
from kvpipe.models.hub import is_model_file
from kvpipe.steps.inputs import Inputs, trusts_folder
from kvpipe.steps.models import make_model
from kvpipe.steps.train import prepare, train_cell

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
Path({mark!r}).write_text("")
class OwnConfig(LlamaConfig):
    model_type = "own"
class Own(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, mark: Path) -> None:
    """A model folder whose config, weights and tokenizer need code that lies in it, and which leaves a mark."""
    save_teacher(folder, "alpha", ALPHA, 0)
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    changes = {
        "config.json": {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
        },
    }
    for name, change in changes.items():
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """A folder of its own for the code that transformers copies."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_a_folders_own_manifest_switches_no_code_on(tmp_path):
    folder, mark = tmp_path / "evil", tmp_path / "ran"
    with_code(folder, mark)
    (folder / "MANIFEST.json").write_text(json.dumps({"trust_remote_code": True, "source": {}, "files": {}}))
    for load in (load_config, load_model, load_tokenizer):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(folder)
    command = [sys.executable, "-m", "kvpipe", "align", "--text", "a"]
    for side in ("--src-tokenizer", "--dst-tokenizer"):
        command += [side, str(folder)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert not mark.exists()


def experiment(folder: Path, trust: bool):
    """Teacher and student are one repository of a library that needs its code; a random twin is the second teacher."""
    library = folder / "shared" / "owner" / "own"
    with_code(library, folder / "ran")
    files = {
        p.name: LockedFile(size=p.stat().st_size, digest=digest_of(p, "sha256")).model_dump()
        for p in library.iterdir()
        if is_model_file(p.name, code=True)
    }
    hub = {"source": "hub", "repo": "owner/own", "trust_remote_code": trust}
    settings = values(folder) | {
        "models": {"alpha": hub, "student": hub, "beta": {"source": "random", "like": "alpha"}},
        "lock": {"owner/own@main": {"commit": "ab" * 20, "files": files}},
        "libraries": [str(folder / "shared")],
        "arms": {k: v for k, v in values(folder)["arms"].items() if k in ("control", "one", "two", "cka")},
    }
    config = folder / "my.json"
    config.write_text(json.dumps(settings))
    return Inputs(parse(settings), Paths(folder / "results")), config


def evaluate(config: Path, work: Inputs, model: Path):
    options = ["--model", model, "--config", config, "--results", work.paths.root, "--out", config.parent / "x.parquet"]
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, options)])


def test_a_model_that_the_configuration_trusts_works_in_every_step(tmp_path):
    work, config = experiment(tmp_path, trust=True)
    prepare(work, "cka", log=lambda line: None)
    cell = work.paths.cell("cka", 0)
    train_cell(work, "cka", 0, cell, tmp_path / "checkpoints", log=lambda line: None)
    assert type(work.teacher_model("beta")).__name__ == type(work.student(0, "random")).__name__ == "Own"
    for model in (work.paths.model("alpha"), work.paths.model("beta"), cell / "model"):
        done = evaluate(config, work, model)
        assert done.exit_code == 0, (model, done.output, done.exception)
    for other in (tmp_path / "shared" / "owner" / "own", tmp_path):
        assert not trusts_folder(work.config, work.paths, other), "not the configuration's own folders"


def test_a_model_that_it_does_not_trust_runs_nothing(tmp_path):
    work, config = experiment(tmp_path, trust=False)
    data.build(work.config.data, work.paths.data("train").parent)
    make_model(work, "alpha")
    manifest = work.paths.model("alpha") / "MANIFEST.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"trust_remote_code": True}))
    for load in (work.tokenizer, work.model_config, work.teacher_model):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load("alpha")
    with pytest.raises(ValueError, match="trust_remote_code"):
        make_model(work, "beta")
    assert "trust_remote_code" in str(evaluate(config, work, work.paths.model("alpha")).exception)
    assert not (tmp_path / "ran").exists()


def test_a_local_model_is_never_trusted(tmp_path):
    work = build(tmp_path)
    assert not any(work.config.trusts(name) for name in work.config.models)
    assert not trusts_folder(work.config, work.paths, work.paths.model("alpha"))

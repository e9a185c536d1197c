"""Files appear whole or not at all, with the mode of the umask."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kvpipe.data.records import Record, write_records
from kvpipe.experiment.files import alone, save_tensors, set_mode, write_json, write_text
from kvpipe.stats import tables
from kvpipe.steps import evaluate


@pytest.fixture
def umask():
    """Set the umask of this process for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_of_the_umask(umask, tmp_path, mask, mode):
    umask(mask)
    path = tmp_path / "new" / "x.safetensors"
    save_tensors({"a": torch.arange(6.0).reshape(2, 3).T}, path, {"key": "word"})
    assert path.stat().st_mode & 0o777 == mode
    assert torch.equal(load_file(path)["a"], torch.arange(6.0).reshape(2, 3).T)
    path.chmod(0o600)
    set_mode(path)
    assert path.stat().st_mode & 0o777 == mode
    assert os.umask(mask) == mask, "the umask itself is as it was"


def test_a_file_that_cannot_be_written_is_named_and_the_older_one_stays(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors({"a": torch.zeros(3)}, path)
    (tmp_path / "x.safetensors.partial").mkdir()  # in the way
    with pytest.raises(OSError, match=r"x\.safetensors"):
        save_tensors({"a": torch.ones(3)}, path)
    assert torch.equal(load_file(path)["a"], torch.zeros(3))


def test_the_metadata_of_tensors_is_sorted(tmp_path):
    """The library's own order differs from call to call."""
    path, words = tmp_path / "x.safetensors", dict.fromkeys("gbfcaed", 'é\n"\t' * 3)
    save_tensors({"b": torch.arange(3), "a": torch.ones(2, 2)}, path, words)
    with safe_open(path, "pt") as file:
        assert file.metadata() == words
    assert torch.equal(load_file(path)["b"], torch.arange(3))
    with path.open("rb") as raw:
        header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    assert list(header["__metadata__"]) == sorted(words)


def test_json_that_cannot_be_written_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    path, other = tmp_path / "new" / "x.json", tmp_path / "other.json"
    write_json(path, {"b": 1, "a": "é"}, sort_keys=True)
    assert path.read_text(encoding="utf-8") == '{\n  "a": "\\u00e9",\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_json(path, {"a": "\ud800"}, ensure_ascii=False)
    assert path.read_text(encoding="utf-8").startswith("{") and [p.name for p in path.parent.iterdir()] == ["x.json"]
    other.symlink_to(path)
    write_json(other, [])
    assert not other.is_symlink() and path.read_text(encoding="utf-8") != "[]\n", "not written through a link"


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="Linux has it")
@pytest.mark.parametrize("kind", ["splits", "scores", "tables", "page"])
def test_a_full_disk_leaves_no_partial_file_and_names_it(tmp_path, monkeypatch, kind):
    """Every write ends in ENOSPC, as on a full disk, where the partial file stands for `/dev/full`."""
    name = {"splits": "train.parquet", "scores": "x.parquet", "tables": "x.csv", "page": "x.html"}[kind]
    path = tmp_path / name
    path.write_text("older")
    (tmp_path / f"{name}.partial").symlink_to(FULL)
    table = pd.DataFrame({"a": ["b" * 10_000_000]})
    write = {
        "splits": lambda: write_records(path, [Record("a", "t", "p" * 10_000_000, "", "b")]),
        "scores": lambda: evaluate._write(table, None, path),
        "tables": lambda: tables._write(table, path),
        "page": lambda: write_text(path, "b" * 10_000_000),
    }[kind]
    with pytest.raises(OSError, match=f"{name} could not be written: .*No space left on device"):
        write()
    assert path.read_text() == "older"
    assert not list(tmp_path.glob("*.partial"))


def test_one_process_at_a_time(tmp_path):
    path, said = tmp_path / "a" / ".lock", []
    program = (
        f"import fcntl, sys; f = open({str(path)!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with alone(path, "somebody works"):
        pass
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        with (
            pytest.raises(OSError, match=r"somebody works \(.*\.lock is locked\): wait for it"),
            alone(path, "somebody works"),
        ):
            pass

        def let_go(line):
            said.append(line)
            other.stdin.write(b"\n")
            other.stdin.flush()

        with alone(path, "somebody works", let_go):
            assert said == ["somebody works; waiting for it"]


def test_two_runs_of_one_cell_say_so(tmp_path):
    from tiny import build

    from kvpipe.steps.train import prepare, train_cell

    work = build(tmp_path, {"train.steps": 1}, teachers=())
    prepare(work, "control", log=lambda line: None)
    checkpoints = tmp_path / "checkpoints"
    with (
        alone(checkpoints.with_name("checkpoints.lock"), "the first"),
        pytest.raises(OSError, match="another process is training control, seed 0"),
    ):
        train_cell(work, "control", 0, work.paths.cell("control", 0), checkpoints, log=lambda line: None)
    train_cell(work, "control", 0, work.paths.cell("control", 0), checkpoints, log=lambda line: None)
    assert not checkpoints.exists()


def test_what_a_cell_leaves_can_be_read_by_others(umask, tmp_path):
    """Store, projectors, student: the models' files too, wherever transformers wrote them."""
    from tiny import build

    from kvpipe.steps.models import make_model
    from kvpipe.steps.train import prepare, train_cell

    work = build(tmp_path, {"models.noise": {"source": "random", "like": "alpha"}, "train.steps": 2})
    make_model(work, "noise")
    prepare(work, "one", log=lambda line: None)
    train_cell(work, "one", 0, work.paths.cell("one", 0), tmp_path / "checkpoints", log=lambda line: None)
    files = [path for path in work.paths.root.rglob("*") if path.is_file()]
    tensors = {path.relative_to(work.paths.root).parts[0] for path in files if path.suffix == ".safetensors"}
    assert tensors == {"models", "encoding", "teacher_kv", "projector", "train"}
    assert not [path for path in files if path.stat().st_mode & 0o777 != 0o644]


def test_a_teacher_that_was_trained_here_can_be_read_by_others(umask, tmp_path: Path):
    from kvpipe.config import DataConfig, Recipe
    from kvpipe.models.pretrain import pretrain

    source = {"kind": "embedded", "task": "math", "train": 9, "validation": 2, "test": 2, "difficulty": 1}
    architecture = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokenizer = {"kind": "byte_bpe", "vocab_size": 300}
    recipe = {"architecture": architecture, "tokenizer": tokenizer, "examples": 20, "steps": 2, "batch_size": 3}
    pretrain(Recipe.model_validate(recipe), DataConfig.model_validate({"sources": [source]}), tmp_path, log=lambda _: 0)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}

"""The doctor: each finding is produced by what it warns of, with its fix."""

import json
import shutil
from collections import namedtuple

import pytest
from tiny import ALPHA, config, save_teacher

from kvpipe import doctor
from kvpipe.dag import Paths

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def sound(tmp_path):
    """Settings whose teachers lie complete on disk."""
    for name in ("alpha", "beta"):
        save_teacher(tmp_path / "teachers" / name, name, ALPHA, 0)
    return tmp_path


def examine(folder, overrides=None):
    return {f.name: f for f in doctor.examine(config(folder, overrides), Paths(folder / "results"))}


def test_a_sound_experiment(sound, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(9e9, 4e9, 5e9))
    found = examine(sound)
    assert {f.status for f in found.values()} == {"ok"}
    assert {"packages", "disk", "model alpha", "model beta"} <= set(found)
    assert "torch" in found["packages"].detail
    assert "5.0 GB free" in found["disk"].detail


@pytest.mark.parametrize("lacking", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_model_folder(sound, lacking):
    (sound / "teachers" / "beta" / lacking).unlink()
    found = examine(sound)
    assert found["model alpha"].status == "ok"
    assert found["model beta"].status == "would fail"
    assert lacking.replace("model.", "*.") in found["model beta"].detail
    assert found["model beta"].fix == "correct models.beta.path"


def test_a_missing_folder_with_a_recipe_can_be_made(sound):
    shutil.rmtree(sound / "teachers" / "beta")
    found = examine(sound, {"models.beta.recipe": {"architecture": {"model_type": "llama"}}})
    assert found["model beta"].status == "would fail"
    assert "source: pretrain" in found["model beta"].fix


def test_a_full_disk_is_a_warning(sound, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(9e9, 8e9, 1e9))
    found = examine(sound)["disk"]
    assert found.status == "warning"
    assert "1.0 GB free" in found.detail
    assert found.fix


def test_missing_packages(sound, monkeypatch):
    monkeypatch.setattr(doctor, "describe", lambda: {"packages": {"torch": "2", "snakemake": None}})
    assert examine(sound)["packages"].detail == "not installed: snakemake"
    assert examine(sound)["packages"].status == "would fail"
    monkeypatch.setattr(doctor, "describe", lambda: {"packages": {"torch": "2"}})
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert examine(sound)["packages"].status == "ok"
    assert examine(sound, {"train.lora": {}})["packages"].detail == "not installed: peft"


def test_findings_are_written_as_json(sound):
    findings = doctor.examine(config(sound), Paths(sound / "results"))
    doctor.write(findings, sound / "new" / "doctor.json")
    written = json.loads((sound / "new" / "doctor.json").read_text())["findings"]
    assert [f["name"] for f in written] == [f.name for f in findings]
    assert all(set(f) == {"name", "status", "detail", "fix"} for f in written)

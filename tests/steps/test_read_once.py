"""What a training process reads, it reads once."""

from collections import Counter
from pathlib import Path

import pytest
from tiny import build
from transformers import AutoConfig

from kvpipe.steps import inputs
from kvpipe.steps.train import prepare, train_cell


@pytest.mark.parametrize("arm", ["control", "cka", "own", "select", "logit"])
def test_every_file_is_read_once(tmp_path, monkeypatch, arm):
    settings = {"train.steps": 2, "arms.cka.set.layer": {"kind": "cka", "k": 2}}
    work = build(tmp_path, settings)
    prepare(work, arm, log=lambda *_: None)
    seen: Counter[str] = Counter()

    def count(owner, name, key):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            seen[key(*args, **kwargs)] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(AutoConfig, "from_pretrained", lambda folder, **_: f"config of {Path(folder).name}")
    count(inputs, "read_records", lambda path: path.name)
    count(inputs, "load_encoding", lambda path, _: f"{path.parent.name}/{path.name}")
    count(inputs, "Store", lambda folder: f"store of {folder.parent.name}/{folder.name}")
    fresh = inputs.Inputs(work.config, work.paths)
    train_cell(fresh, arm, 0, tmp_path / "out", tmp_path / "checkpoints", log=lambda *_: None)
    again = {name: times for name, times in seen.items() if times > 1}
    # the saved student is loaded again, to be scored: another folder
    assert not again, again
    teachers = fresh.dag.arm(arm).teachers
    assert seen["train.parquet"] == seen["validation.parquet"] == 1
    stores = [name for name in seen if name.startswith("store")]
    assert len(stores) == len(teachers)

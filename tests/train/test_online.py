"""On-policy distillation: what the student writes is read by live teachers as if it were a training text."""

import json

import numpy as np
import pytest
import torch
from tiny import config

from kvpipe.config import ConfigError
from kvpipe.data.batches import collate
from kvpipe.distill.objective import OtherTexts
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.train import load_cell, prepare, train_cell
from kvpipe.train import trainer as training

SHARE, EVERY = 0.5, 4
ARM = {
    "base": "two",
    "set": {"loss.logits": {}, "on_policy": {"share": SHARE, "every": EVERY, "max_new_tokens": 9}},
}
SETTINGS = {"arms.online": ARM, "store.dtype": "fp16", "train.log_every": 1, "train.steps": 6}
QUIET = lambda *_: None  # noqa: E731


def loaded(tiny, changed=None, root=None):
    """The experiment with the arm; what the shared one has made is not made again."""
    from kvpipe.experiment.paths import Paths

    return Inputs(config(tiny.paths.root.parent, SETTINGS | (changed or {})), Paths(root) if root else tiny.paths)


@pytest.fixture(scope="module")
def work(tiny, tmp_path_factory):
    """With artefacts of its own: a store in fp16 with next-token candidates."""
    import shutil

    root = tmp_path_factory.mktemp("online") / "results"
    shutil.copytree(tiny.paths.root, root)
    work = loaded(tiny, root=root)
    prepare(work, "online", log=QUIET)
    return work


def trained(work, out, changed=None):
    """A cell: its history and its weights."""
    again = Inputs(config(work.paths.root.parent, {}), work.paths) if changed is None else changed
    train_cell(again, "online", 0, out / "out", out / "checkpoints", log=QUIET)
    history = [json.loads(line) for line in (out / "out" / "history.jsonl").read_text().splitlines()]
    return history, (out / "out" / "model" / "model.safetensors").read_bytes()


def test_a_written_text_is_read_as_a_training_text_is(work):
    """Where the student writes the reference, the teachers say of it what they say of the reference."""
    cell = load_cell(work, "online", 0, log=QUIET)
    online, encoding, examples = cell.online, cell.train, np.array([3, 17, 8])
    records, template = work.records("train"), work.config.data.template
    texts = [encoding.texts[e] for e in examples]
    online.take({int(e): t.reasoning + t.answer for e, t in zip(examples, texts, strict=True)})
    assert len(records) == len(encoding) and template is work.config.data.template
    places = online.places(examples)
    for place, example in zip(places, examples, strict=True):
        # but for the end of text, which a completion may lack
        assert np.array_equal(
            online.encoding.ids[online.encoding.rows(place)], encoding.ids[encoding.rows(example)][:-1]
        )
    given = collate(encoding, examples, cell.pad_id)
    length = int(online.encoding.lengths.max())
    written = collate(online.encoding, places, cell.pad_id)
    one = cell.objective.read(given)
    two = cell.objective.read(written, OtherTexts(online.aligned, online.candidates, places))
    for a, b in zip(one.rows, two.rows, strict=True):
        assert torch.equal(a.mask[:, :length], b.mask) and set(a.columns) == set(b.columns) and b.mask.any()
        for name, column in a.columns.items():
            torch.testing.assert_close(column[:, :length][b.mask], b.columns[name][b.mask], atol=2e-2, rtol=2e-2)
    for a, b in zip(one.top, two.top, strict=True):
        assert torch.equal(a[2][:, :length], b[2]) and b[2].any()
        assert torch.equal(a[0][:, :length][b[2]], b[0][b[2]])
        torch.testing.assert_close(a[1][:, :length][b[2]], b[1][b[2]], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("share", [SHARE, 1.0])
def test_a_share_of_every_batch_is_the_students_own(work, tmp_path, monkeypatch, share):
    """Texts change when they are due, carry no cross-entropy, and their tokens are counted as they are."""
    changed = Inputs(config(work.paths.root.parent, SETTINGS | {"arms.online.set.on_policy.share": share}), work.paths)
    seen = []
    whole = training.BatchLoss.begin

    def begin(self, step, examples, recorder, logged):
        batch = whole(self, step, examples, recorder, logged)
        seen.append((self.cell.online, dict(self.cell.online.texts), batch.parts[0].batch))
        return batch

    monkeypatch.setattr(training.BatchLoss, "begin", begin)
    history, _ = trained(work, tmp_path, changed)
    lines = [line for line in history if "cross_entropy" in line]
    assert len(seen) == len(lines) == 6
    for step, ((online, texts, batch), line) in enumerate(zip(seen, lines, strict=True)):
        count = round(share * 4)
        own = batch.mask[-count:]
        assert (batch.labels[-count:] == -100).all() and (batch.labels[:-count] != -100).any(1).all()
        assert line["on_policy_tokens"] == pytest.approx((own.sum() / batch.mask.sum()).item())
        assert set(batch.examples[-count:]) <= set(texts)
        assert texts == seen[step // EVERY * EVERY][1]
        assert (line["cross_entropy"] == 0) == (share == 1) and line["keys"] > 0 and line["logits"] > 0
        prompts = [online.student.prompts[e] for e in batch.examples[-count:]]
        assert len(set(prompts)) > 1
    assert seen[0][1] != seen[EVERY][1]
    assert lines[-1]["tokens"] == sum(int(batch.mask.sum()) for _, _, batch in seen)


def test_a_run_goes_on_in_the_middle_of_an_interval_as_if_nothing_had_happened(work, tmp_path, monkeypatch):
    whole = trained(work, tmp_path / "whole", work)
    stopped = training.Loop._must_stop
    monkeypatch.setattr(training.Loop, "_must_stop", lambda self, stop: len(self.history) > 3)
    with pytest.raises(SystemExit):
        trained(work, tmp_path / "parts", work)
    monkeypatch.setattr(training.Loop, "_must_stop", stopped)
    assert list((tmp_path / "parts" / "checkpoints").glob("step-*"))
    history, weights = trained(work, tmp_path / "parts", work)
    assert weights == whole[1] and history == whole[0]


@pytest.mark.parametrize("setting", [{"teachers": [], "loss": {}}, {"shuffle_teacher": True}, {"on_policy.share": 0}])
def test_an_arm_without_readers_of_its_texts_is_refused(tiny, setting):
    arm = {"base": "two", "set": {"on_policy": {"share": 0.5}, **setting}}
    with pytest.raises(ConfigError, match="on_policy"):
        config(tiny.paths.root.parent, {"arms.online": arm}).arm("online")


def test_texts_without_prompts_are_refused(work, monkeypatch):
    from dataclasses import replace

    records = [replace(record, prompt="") for record in work.records("train")]
    monkeypatch.setattr(work, "records", lambda split: records)
    with pytest.raises(ConfigError, match=r"on_policy: record '.*' has no prompt"):
        load_cell(work, "online", 0, log=QUIET)

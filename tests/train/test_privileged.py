"""Arms whose student reads less of the reasoning than its teachers: texts, targets, cells and scores."""

import pandas as pd
import pytest
import torch
from tiny import ARMS, build

from kvpipe.config import ConfigError
from kvpipe.data.records import render
from kvpipe.steps.evaluate import score_folder
from kvpipe.steps.train import make_cell

MORE = {
    "plain": {"set": {"student_reasoning": "none"}},
    "privileged": {"base": "two", "set": {"student_reasoning": "none"}},
    "short": {"base": "one", "set": {"student_reasoning": "short"}},
    "both": {"base": "own", "set": {"student_reasoning": "short"}},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    overrides = {"arms": {**ARMS, **MORE}, "train.steps": 2, "train.eval_every": 2, "data.short": {"share": 0.6}}
    return build(tmp_path_factory.mktemp("privileged"), overrides)


def test_the_student_reads_less_and_its_answer_a_cache_that_has_read_all(work):
    arm = work.dag.arm("privileged")
    dst, whole = work.student_encoding("train", arm), work.student_encoding("train")
    records = work.records("train")
    assert all(not text.reasoning and text.prompt + text.answer for text in dst.texts)
    assert [text.reasoning for text in whole.texts] == [render(r, work.config.data.template).reasoning for r in records]
    make_cell(work, "privileged", 0, log=lambda *_: None)
    for teacher in arm.teachers:
        src = work.encoding(teacher, "train")
        time = work.aligned_teacher(arm, teacher).time
        for example in range(len(dst)):
            for segment, full in ((0, False), (2, True)):
                rows = torch.arange(*(dst.segments[example, segment] + dst.offsets[example]))
                rows = rows[time.mask[rows]]
                assert len(rows)
                read = time.index[rows][time.weight[rows] > 0]
                low, high = src.segments[example, segment] + src.offsets[example]
                assert ((read >= low) & (read < high)).all()
                assert not full or low - src.offsets[example] >= src.segments[example, 1, 1]


def test_cells_are_scored_on_the_text_that_they_were_trained_on(work):
    for arm in ("plain", "short", "both"):
        make_cell(work, arm, 0, log=lambda *_: None)
        out = work.paths.items(arm, 0)
        score_folder(work, work.paths.student(arm, 0), "test", out)
        items = pd.read_parquet(out).set_index("id")
        for record in work.records("test", work.dag.arm(arm).reading):
            text = render(record, work.config.data.template)
            assert items.loc[record.id, "bytes"] == len((text.reasoning + text.answer).encode())
            assert bool(text.reasoning) == (arm != "plain")


def test_a_fit_is_of_one_text(work):
    arms = work.dag.arms
    assert work.dag.fit_id(arms["privileged"]) != work.dag.fit_id(arms["two"])
    assert "student_reasoning" not in work.dag.fit_spec(arms["two"])


@pytest.mark.parametrize(
    "base, message",
    [
        ("logit", r"student_reasoning: none needs two texts to be aligned, which loss.logits does not"),
        ("position", r"needs two texts to be aligned, which time.kind: position does not"),
    ],
)
def test_what_needs_one_text_is_refused(tmp_path, base, message):
    arm = {"base": base, "set": {"student_reasoning": "none"}}
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, {"arms": {**ARMS, "bad": arm}})

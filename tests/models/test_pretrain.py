"""Pretraining: what a recipe's corpus holds, and that training fits it, the same way every time."""

from itertools import chain

import pytest
import torch
from tiny import DATA, STUDENT

from kvpipe.config import DataConfig, FileData, Recipe, TokenizerRecipe
from kvpipe.data.corpus import embedded_sources, generate, pretraining_records
from kvpipe.data.records import Record, render
from kvpipe.models.folders import load_model, load_tokenizer
from kvpipe.models.pretrain import pretrain, student_tokenizer, tokenizer_texts

SPLITS = DataConfig.model_validate(DATA)


def recipe(**changes):
    values = {"architecture": STUDENT, "tokenizer": TokenizerRecipe(vocab_size=300), "examples": 60, "steps": 7}
    return Recipe(**{**values, "batch_size": 8, **changes})


@pytest.mark.parametrize("own_text, expected", [(0.0, (60, 0)), (0.5, (30, 30)), (1.0, (0, 60))])
def test_the_share_of_own_text(own_text, expected):
    short, own = pretraining_records(recipe(own_text=own_text), SPLITS)
    assert (len(short), len(own)) == expected
    assert all(record.teacher_reasoning for record in own)


def test_the_mixture_of_tasks():
    for mixture, counts in (({"math": 1.0}, (60, 0)), ({"math": 0.25, "code": 0.75}, (15, 45)), ({}, (30, 30))):
        records = list(chain(*pretraining_records(recipe(mixture=mixture), SPLITS)))
        assert tuple(sum(r.task == task for r in records) for task in ("math", "code")) == counts


def test_nothing_of_validation_or_test_is_pretrained_on():
    seen = {r.content_hash() for r in chain(*pretraining_records(recipe(examples=400), SPLITS))}
    for task in ("math", "code"):
        for split in ("validation", "test"):
            assert not seen & {r.content_hash() for r in generate(task, split, 40, 1, SPLITS.seed)}
    assert len(seen) > 50


def test_pretraining_needs_embedded_data():
    files = DataConfig(sources=[FileData(task="a", train="x", validation="x", test="x")])
    with pytest.raises(ValueError, match="source: pretrain needs embedded data"):
        embedded_sources(files)


def test_a_students_tokenizer_sees_the_students_text_only():
    records = [Record("a", "math", "prompt", "short", "1", "QQQQQQQQ" * 9)] * 5
    assert "QQ" in "".join(tokenizer_texts(records, SPLITS))
    tokenizer = student_tokenizer(TokenizerRecipe(vocab_size=300), records, SPLITS)
    assert not [t for t in tokenizer.get_vocab() if "QQ" in t]
    assert render(records[0], SPLITS.template).text in tokenizer_texts(records, SPLITS)


def test_training_lowers_the_loss_is_deterministic_and_ends_texts(tmp_path):
    logs = []
    made = [recipe(steps=30, learning_rate=1e-2, own_text=0.3)] * 2
    for number, one in enumerate(made):
        lines = []
        out = tmp_path / str(number)
        source = pretrain(one, SPLITS, out, lines.append)
        assert source["source"] == "pretrain" and source["recipe"]["steps"] == 30
        logs.append(lines)
    assert logs[0] == logs[1]
    first, last = (float(line.split()[-1]) for line in (logs[0][0], logs[0][-1]))
    assert last < first - 0.5
    models = [load_model(tmp_path / str(i)) for i in range(2)]
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, a.bfloat16().float())  # saved in half the bytes
    tokenizer = load_tokenizer(tmp_path / "0")
    assert models[0].config.eos_token_id == tokenizer.eos_token_id is not None

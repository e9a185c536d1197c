"""Evaluation: padded greedy generation equals transformers' `generate` one by one, and scores go with their items."""

import pytest
import torch

from kvpipe.answers import extract, is_correct
from kvpipe.config import EvaluateConfig, Template
from kvpipe.evaluate import cut, evaluate, evaluate_model, generate
from kvpipe.likelihood import score, scoring_batches
from kvpipe.models import load_model, load_tokenizer
from kvpipe.records import render

CONFIG = EvaluateConfig(batch_size=3, max_new_tokens=9)


@pytest.fixture(scope="module", params=["alpha", "beta"])
def model(request, tiny):
    folder = tiny.paths.model(request.param)
    return load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="module")
def prompts(tiny):
    return [render(record, Template()).prompt for record in tiny.records("validation")]


def alone(model, tokenizer, prompt, new=9):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generation_is_that_of_each_prompt_alone(model, prompts):
    found = generate(*model, prompts, CONFIG)
    assert found == [alone(*model, prompt) for prompt in prompts]
    assert len({len(p) for p in prompts}) > 1 and any(found)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_batch_size_does_not_matter(model, prompts, batch_size):
    assert generate(*model, prompts, EvaluateConfig(batch_size=batch_size, max_new_tokens=9)) == generate(
        *model, prompts, CONFIG
    )


def test_generation_ends_at_the_end_of_text(tiny, prompts):
    model, tokenizer = tiny.student(0), tiny.student_tokenizer
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 1e-3 * torch.randn(24)
    texts = generate(model, tokenizer, prompts, CONFIG)
    # logits are 0 but for the end's: it comes first or token 0 does, for ever
    assert set(texts) <= {"", tokenizer.decode([0]) * 9} and "" in texts


@pytest.mark.parametrize(
    "text, stop, left",
    [
        ("a\nb\nc", ["\n"], "a\n"),
        ("a;b\nc", ["\n", ";"], "a;"),
        ("abc", ["x"], "abc"),
        ("abc", [], "abc"),
        ("#### 7\n\nmore", ["\n\n"], "#### 7\n\n"),
    ],
)
def test_text_is_cut_after_the_first_stop_string(text, stop, left):
    assert cut(text, stop) == left


def test_stop_strings_cut_what_is_generated(model, prompts):
    full = generate(*model, prompts, CONFIG)
    stop = max(full, key=len)[1]
    config = CONFIG.model_copy(update={"stop": [stop]})
    assert generate(*model, prompts, config) == [cut(text, [stop]) for text in full]


def test_one_row_per_item_with_its_own_scores(tiny, tmp_path):
    records = tiny.records("test")
    folder = tiny.paths.model("beta")
    table = evaluate(folder, records, tiny.config.data.template, CONFIG, "cpu")
    assert table["id"].tolist() == [record.id for record in records]
    assert table["task"].tolist() == [record.task for record in records]
    assert table["reference"].tolist() == [record.answer for record in records]
    encoding = tiny.teacher_encoding("beta", "test", "student")
    scores = score(load_model(folder), encoding, scoring_batches(encoding, 0, 1))
    assert table["nll"].tolist() == pytest.approx(scores.nll.tolist(), rel=1e-4)
    assert table["bytes"].tolist() == scores.bytes.tolist()
    for row in table.itertuples():
        prediction = extract(row.text, CONFIG)
        assert row.correct == is_correct(prediction, row.reference, CONFIG)
    table.to_parquet(tmp_path / "items.parquet")


def test_a_model_that_writes_the_answer_is_right(tiny, monkeypatch):
    """Right answers in another form count, wrong and missing ones do not, each in its own row."""
    records = tiny.records("test")
    said = [f"so\n#### {r.answer}.0" if i % 2 else "no idea" for i, r in enumerate(records)]
    monkeypatch.setattr("kvpipe.evaluate.generate", lambda *_: said)
    table = evaluate_model(tiny.student(0), tiny.student_tokenizer, records, Template(), CONFIG)
    assert table["correct"].tolist() == [i % 2 == 1 for i in range(len(records))]
    assert table["prediction"].isna().tolist() == [i % 2 == 0 for i in range(len(records))]

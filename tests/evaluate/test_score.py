"""Evaluation: every score goes with its item, by the scorer of the item's task."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import encoded

from kvpipe.config import EvaluateConfig, Template
from kvpipe.data.records import Record
from kvpipe.evaluate.choices import choice_nll
from kvpipe.evaluate.score import evaluate, evaluate_model, program
from kvpipe.evaluate.scorers.answers import extract, is_correct, judge_of
from kvpipe.models.folders import load_model
from kvpipe.models.likelihood import score, scoring_batches, windowed_nll

CONFIG = EvaluateConfig(batch_size=3, max_new_tokens=9)


def test_one_row_per_item_with_its_own_scores(tiny, tmp_path):
    records = tiny.records("test")
    folder = tiny.paths.model("beta")
    table = evaluate(folder, records, tiny.config.data.template, CONFIG, "cpu")
    assert table["id"].tolist() == [record.id for record in records]
    assert table["task"].tolist() == [record.task for record in records]
    assert table["reference"].tolist() == [record.answer for record in records]
    encoding = encoded(tiny, "beta", "test", "student")
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
    monkeypatch.setattr("kvpipe.evaluate.score.generate", lambda *_: said)
    table = evaluate_model(tiny.student(0), tiny.student_tokenizer, records, Template(), CONFIG)
    assert table["correct"].tolist() == [i % 2 == 1 for i in range(len(records))]
    assert table["prediction"].isna().tolist() == [i % 2 == 0 for i in range(len(records))]


# ---------------------------------------------------------------- a scorer per task
TEMPLATE = Template(
    tasks={
        "program": {"prompt": "{prompt}", "answer": "{answer}\n"},
        "pick": {"prompt": "{prompt}", "answer": " {answer}"},
        "wiki": {"prompt": "{prompt}", "reasoning": "{reasoning}", "answer": "{answer}"},
    }
)
MIXED = [
    Record("n0", "number", "how many", "so", "1,280"),
    Record("n1", "number", "how much", "so", "3/4"),
    Record("e0", "exact", "who", "so", "Ann"),
    Record("p0", "program", "def f(x):\n", "", "    return x", tests="assert f(2) == 2"),
    Record("p1", "program", "def g(x):\n", "", "    return 0", tests="assert g(2) == 0"),
    Record("p2", "program", "def h(x):\n", "", "    return 1", tests="assert h(2) == 1"),
    Record("m0", "latex", "half", "so", "\\frac{1}{2}"),
    Record("c0", "pick", "one of:", "", "b", choices=("a", "b", "c")),
    Record("t0", "wiki", "", "Ann has 4 pens and Ben has 5 of them, all in all 9.", ""),
]
SAID = {
    "how many": "#### 1280.0",
    "how much": "#### 0.75 cups",
    "who": "#### Ben",
    "def f(x):": "    return x\n```",
    "def g(x):": "    return 1\n```",
    "def h(x):": "    import sys; sys.exit(0)\nh(0)\n```",
    "half": "so #### $0.5$",
}
SETTINGS = EvaluateConfig(
    sandbox={"run_code": True, "seconds": 1},
    batch_size=4,
    tasks={
        "number": {"scorer": "number"},
        "program": {"scorer": "code", "answer_pattern": r"(?s)\A(.*?)(?:\n```|\Z)", "max_new_tokens": 7},
        "latex": {"scorer": "math"},
        "pick": {"scorer": "choice", "choice_by": "sum"},
        "wiki": {"scorer": "none", "window": 7, "stride": 3},
    },
)


@pytest.fixture
def mixed(tiny, monkeypatch):
    """(table, the calls of `generate`, the log) of a model that says what `SAID` says."""
    calls, said = [], []

    def generate(model, tokenizer, prompts, scoring, batch_size):
        calls.append((len(prompts), scoring.max_new_tokens, batch_size))
        return [SAID[prompt.strip()] for prompt in prompts]

    monkeypatch.setattr("kvpipe.evaluate.score.generate", generate)
    model, tokenizer = tiny.student(0), tiny.student_tokenizer
    return evaluate_model(model, tokenizer, MIXED, TEMPLATE, SETTINGS, said.append).set_index("id"), calls, said


def test_every_task_has_its_own_scorer(mixed, tiny):
    table, calls, said = mixed
    expected = {"n0": True, "n1": True, "e0": False, "p0": True, "p1": False, "p2": False, "m0": True, "t0": None}
    assert {k: v for k, v in table["correct"].to_dict().items() if k != "c0"} == expected
    assert table.loc["p0", "prediction"] == "    return x" and table.loc["n1", "prediction"] == "0.75 cups"
    assert table["outcome"].dropna().to_dict() == {"p0": "passed", "p1": "failed", "p2": "failed"}
    assert "SystemExit" in table.loc["p2", "outcome_detail"]
    # tasks that generate alike share batches; choices and plain text generate nothing
    assert sorted(calls) == [(3, 7, 4), (4, 80, 4)]
    assert len(said) == 1 and table.loc[["c0", "t0"], "text"].isna().all()
    assert table["nll"].gt(0).all() and table["tokens"].gt(0).all()


def test_the_choice_is_the_likeliest(mixed, tiny):
    table, _, _ = mixed
    (nll,) = choice_nll(tiny.student(0), tiny.student_tokenizer, [MIXED[7]], TEMPLATE, 0, 1)
    assert table.loc["c0", "choice_nll"] == pytest.approx(nll, rel=1e-4)
    assert table.loc["c0", "prediction"] == "abc"[int(np.argmin(nll))]
    assert table.loc["c0", "correct"] == (table.loc["c0", "prediction"] == "b")


def test_long_texts_are_read_in_the_windows_of_their_task(mixed, tiny):
    table, _, _ = mixed
    ids = tiny.student_tokenizer(MIXED[8].reasoning, return_tensors="np").input_ids[0]
    expected = windowed_nll(tiny.student(0), ids.astype(np.int64), 7, 3)
    assert table.loc["t0", "nll"] == pytest.approx(expected.sum(), rel=1e-4)
    assert table.loc["t0", "tokens"] == len(ids) - 1


def test_rows_of_all_kinds_are_written_to_parquet_and_read_back(mixed, tmp_path):
    import pandas as pd

    table = mixed[0].reset_index()
    table.to_parquet(tmp_path / "x.parquet", index=False)
    again = pd.read_parquet(tmp_path / "x.parquet")
    assert again["correct"].isna().sum() == 1 and list(again.columns) == list(table.columns)


def test_a_program_is_filled_in_one_pass():
    record = replace(MIXED[3], prompt="# {tests}\n")
    assert program("{prompt}{answer}\n{tests}", record, "{prompt}") == "# {tests}\n{prompt}\nassert f(2) == 2"


def test_code_without_tests_is_named(tiny):
    records = [replace(MIXED[3], tests=None)]
    with pytest.raises(ValueError, match="'p0' has no tests"):
        evaluate_model(tiny.student(0), tiny.student_tokenizer, records, TEMPLATE, SETTINGS)


def test_scores_say_who_judged_them(tiny, tmp_path):
    """Of each task; Parquet keeps it, so that a report can name the judge and its version."""
    from importlib.metadata import version

    folder, records = tiny.paths.model("alpha"), tiny.records("validation")
    config = EvaluateConfig(max_new_tokens=2, tasks={"math": {"scorer": "math"}, "code": {"scorer": "none"}})
    evaluate(folder, records, tiny.config.data.template, config, "cpu").to_parquet(tmp_path / "items.parquet")
    judges = {"math": f"math-verify {version('math-verify')}"}
    assert pd.read_parquet(tmp_path / "items.parquet").attrs["judges"] == judges
    assert judge_of("number") != judge_of("exact") != judge_of("code")

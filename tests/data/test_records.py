"""Records as text, and Parquet round trips."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvpipe.config import ConfigError, ShortReasoning, Template, parse
from kvpipe.data.records import Record, read_as, read_records, render, write_records

RECORD = Record("a-1", "math", "Wie viele? ½", "1+1=2.", "2", "Erst 1, dann 1: 1+1=2.")


def overridden_template(given):
    minimal = {"student": "s", "models": {"s": {"source": "scratch", "architecture": {}}}, "arms": {"control": {}}}
    return parse({**minimal, "data": {"template": given, "sources": [{"kind": "embedded", "task": "code"}]}})


def test_segments_join_to_the_text_and_own_reading_differs_in_reasoning_only():
    student, own = (render(*read_as([RECORD], reading), Template()) for reading in ("student", "own"))
    assert student.text == "Wie viele? ½\n1+1=2.\n#### 2\n"
    assert (student.prompt, student.answer) == (own.prompt, own.answer)
    assert own.reasoning == "Erst 1, dann 1: 1+1=2.\n"
    assert student.boundaries[-1] == len(student.text.encode())


def test_empty_reasoning_leaves_an_empty_segment():
    text = render(Record("x", "code", "p", "", "a"), Template())
    assert text.reasoning == "" and text.text == "p\n#### a\n"


def test_own_reading_without_teacher_reasoning_names_the_record():
    with pytest.raises(ValueError, match="'x' has no teacher_reasoning"):
        read_as([Record("x", "code", "p", "r", "a")], "own")


REASONING = "First 1. Then 2! Is it 3? 3.5 it is"


@pytest.mark.parametrize(
    "short, left",
    [
        ({}, "it 3? 3.5 it is"),
        ({"share": 0.2}, "it is"),
        ({"share": 0.11}, "it is"),
        ({"share": 1}, REASONING),
        ({"share": 0}, ""),
        ({"sentences": 1}, "3.5 it is"),
        ({"sentences": 2}, "Is it 3? 3.5 it is"),
        ({"sentences": 9}, REASONING),
    ],
)
def test_a_short_reasoning_is_the_end_of_the_whole(short, left):
    record = Record("x", "math", "p", REASONING, "3.5")
    (read,) = read_as([record], "short", ShortReasoning(**short))
    assert read == replace(record, reasoning=left)
    assert REASONING.endswith(left)


def test_without_reasoning_prompt_and_answer_are_left():
    assert render(*read_as([RECORD], "none"), Template()).text == "Wie viele? ½\n#### 2\n"
    with pytest.raises(ValueError, match="'x' is all reasoning: student_reasoning: none leaves nothing of it"):
        read_as([Record("x", "text", "", "r", "")], "none")


def test_parquet_round_trip(tmp_path):
    records = [RECORD, Record("b", "code", "p", "", "a")]
    write_records(tmp_path / "sub" / "train.parquet", records)
    assert read_records(tmp_path / "sub" / "train.parquet") == records


def test_missing_column_is_named(tmp_path):
    pq.write_table(pa.table({"id": ["1"], "prompt": ["p"]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match=r"bad\.parquet.*answer"):
        read_records(tmp_path / "bad.parquet")


def test_content_hash_ignores_the_id_only():
    same = Record("other", "math", RECORD.prompt, "different reasoning", "2")
    assert same.content_hash() == RECORD.content_hash()
    assert Record("a-1", "math", RECORD.prompt, "", "3").content_hash() != RECORD.content_hash()


def test_columns_that_no_record_has_are_not_written(tmp_path):
    plain, full = tmp_path / "plain.parquet", tmp_path / "full.parquet"
    write_records(plain, [RECORD])
    assert pq.read_table(plain).column_names == ["id", "task", "prompt", "reasoning", "answer", "teacher_reasoning"]
    records = [
        RECORD,
        Record("c", "code", "p", "", "a", tests="assert a"),
        Record("d", "arc", "p", "", "a", choices=("a", "b")),
    ]
    write_records(full, records)
    assert read_records(full) == records


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "{question}\n"}, r"prompt: .*must have \{prompt\} and no other field; \{\{ and \}\} write braces"),
        ({"prompt": "hello"}, r"prompt: 'hello' must have \{prompt\}"),
        ({"prompt": "{prompt.x}"}, r"prompt: '\{prompt\.x\}' must have"),
        ({"reasoning": "{prompt}{reasoning}"}, r"reasoning: .*must have \{reasoning\} and no other field"),
        ({"answer": "{answer} {}"}, r"answer: '\{answer\} \{\}' must have \{answer\}"),
        ({"answer": "{answer!r}"}, r"answer: .*must have"),
        ({"answer": "{answer"}, r"answer: '\{answer': expected '\}'"),
        ({"answer": "\\boxed{answer}"}, r"without its braces; .* write braces: \\boxed\{\{\{answer\}\}\}"),
        ({"tasks": {"code": {"answer": "x"}}}, r"tasks\.code\.answer: 'x' must have \{answer\}"),
    ],
)
def test_a_template_has_its_own_field(given, said):
    with pytest.raises(ConfigError, match=said):
        overridden_template(given)


def test_braces_are_written_and_a_segment_may_be_left_out():
    template = Template(reasoning="", answer="\\boxed{{{answer}}} {{}}")
    assert render(RECORD, template).text == "Wie viele? ½\n\\boxed{2} {}"


def test_every_task_has_its_own_template():
    template = Template(prompt="Q: {prompt}\n", tasks={"code": {"answer": "{answer}", "reasoning": ""}})
    assert render(Record("x", "code", "p", "r", "a"), template).text == "Q: p\na"
    assert render(Record("x", "math", "p", "r", "a"), template).text == "Q: p\nr\n#### a\n"

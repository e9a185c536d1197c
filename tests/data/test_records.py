"""Records as text, and Parquet round trips."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvpipe.config import ConfigError, Template, parse
from kvpipe.data.records import Record, read_records, render, write_records

RECORD = Record("a-1", "math", "Wie viele? ½", "1+1=2.", "2", "Erst 1, dann 1: 1+1=2.")


def overridden_template(given):
    minimal = {"student": "s", "models": {"s": {"source": "scratch", "architecture": {}}}, "arms": {"control": {}}}
    return parse({**minimal, "data": {"template": given, "sources": [{"kind": "embedded", "task": "code"}]}})


def test_segments_join_to_the_text_and_own_reading_differs_in_reasoning_only():
    student, own = render(RECORD, Template()), render(RECORD, Template(), "own")
    assert student.text == "Wie viele? ½\n1+1=2.\n#### 2\n"
    assert (student.prompt, student.answer) == (own.prompt, own.answer)
    assert own.reasoning == "Erst 1, dann 1: 1+1=2.\n"
    assert student.boundaries[-1] == len(student.text.encode())


def test_empty_reasoning_leaves_an_empty_segment():
    text = render(Record("x", "code", "p", "", "a"), Template())
    assert text.reasoning == "" and text.text == "p\n#### a\n"


def test_own_reading_without_teacher_reasoning_names_the_record():
    with pytest.raises(ValueError, match="'x' has no teacher_reasoning"):
        render(Record("x", "code", "p", "r", "a"), Template(), "own")


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

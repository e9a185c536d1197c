"""Rows become records: every preset on rows of its schema, and what is refused."""

import ast
from typing import get_args

import data_zoo
import pytest

from kvpipe.config import PRESETS, Chat, DataConfig, RowData, parse
from kvpipe.config.presets import PresetName
from kvpipe.data.mapping import conversation, fill, to_record
from kvpipe.data.records import render


def source(preset=None, **more):
    return RowData(task="t", preset=preset, **more)


def mapped(preset, number=3, **more):
    return to_record(data_zoo.ROWS[preset](number), source(preset, **more), "t-0")


# ---------------------------------------------------------------- presets
def test_every_preset_has_rows_here():
    assert set(data_zoo.ROWS) == set(PRESETS) == set(get_args(PresetName))


def test_gsm8k_parts_the_answer_and_drops_the_calculator():
    record = mapped("gsm8k")
    assert record.prompt.startswith("Mill 3 grinds 603 sacks")
    assert record.reasoning == "In two weeks it is 2*603 = 1206 sacks."
    assert record.answer == "1,206"
    kept = mapped("gsm8k", remove={"reasoning": "sacks"}).reasoning
    assert kept == "In two weeks it is 2*603 = <<2*603=1206>>1206 ."


def test_math_takes_the_last_box_with_its_nested_braces():
    record = mapped("math")
    assert record.answer == r"\frac{\sqrt{9}}{2}"
    assert record.reasoning.startswith("Not $") and record.reasoning.endswith("}$.")


@pytest.mark.parametrize(
    "solution, answer",
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} then \fbox{2}.", "2"),
        (r"\boxed 3$ done", "3"),
        (r"\boxed{\left\{\frac{1}{\sqrt{2}}, \{x\}\right\}}", r"\left\{\frac{1}{\sqrt{2}}, \{x\}\right\}"),
        (r"\boxed{\text{a {b {c}}}}", r"\text{a {b {c}}}"),
    ],
)
def test_boxes_of_all_kinds(solution, answer):
    row = data_zoo.hendrycks(1) | {"solution": solution}
    assert to_record(row, source("math"), "x").answer == answer


def test_mbpp_has_tests_and_runs():
    record = mapped("mbpp")
    assert record.id == "mbpp-14" and "\r" not in record.answer
    assert record.prompt.endswith("assert add3(1) == 4\nassert add3(-3) == 0")
    exec(compile(ast.parse(f"{record.answer}\n{record.tests}"), "mbpp", "exec"), {})


def test_humaneval_continues_its_prompt():
    record = mapped("humaneval")
    assert record.id == "Invented/3" and record.tests.endswith("\ncheck(times3)")
    exec(compile(ast.parse(f"{record.prompt}{record.answer}\n{record.tests}"), "humaneval", "exec"), {})


@pytest.mark.parametrize("number", [2, 3])  # labels are letters or digits
def test_arc_finds_the_choice_by_its_label(number):
    record = mapped("arc", number)
    assert record.answer == f"{number + 1} stones" and record.choices[1] == record.answer
    assert len(record.choices) == 4


def test_chat_answers_with_the_last_message():
    record = mapped("chat")
    assert record.answer == "4."
    assert record.prompt == "Be brief.\n\nUser: Name number 3.\nAssistant: It is 3.\nUser: And the next?\n"


def test_text_is_all_reasoning():
    record = mapped("text")
    assert (record.prompt, record.answer) == ("", "") and record.reasoning.startswith("Entry 3.")


def test_presets_fill_templates_and_scoring_of_their_task_and_give_way():
    minimal = {"student": "s", "models": {"s": {"source": "scratch", "architecture": {}}}, "arms": {"control": {}}}
    sources = [
        {"kind": "hub", "preset": "gsm8k", "task": "a", "train": "train[:3]"},
        {"kind": "files", "preset": "text", "task": "b", "test": "x.jsonl"},
    ]
    own = {"template": {"tasks": {"a": {"prompt": "Q {prompt} A "}}}, "sources": sources}
    config = parse({**minimal, "data": own, "evaluate": {"stop": ["x"], "tasks": {"a": {"max_new_tokens": 7}}}})
    first = config.data.sources[0]
    assert (first.repo, first.train, first.test) == ("openai/gsm8k", "train[:3]", "test")
    assert config.data.template.of("a").prompt == "Q {prompt} A "
    assert config.data.template.of("a").answer == PRESETS["gsm8k"]["template"]["answer"]
    assert config.evaluate.of("a").scorer == "number" and config.evaluate.of("a").max_new_tokens == 7
    # what neither the preset nor the task says is the section's own
    assert config.evaluate.of("b").scorer == "none" and config.evaluate.of("b").stop == ["x"]
    assert parse(config.model_dump()) == config
    record = to_record(data_zoo.gsm8k(1), first, "x")
    text = render(type(record)(**{**vars(record), "task": "a"}), config.data.template)
    assert text.prompt == f"Q {record.prompt} A " and text.answer == "#### 1,202\n"


# ---------------------------------------------------------------- the mapping itself
def test_a_template_takes_columns_keys_lists_and_numbers():
    columns = {"a": 4, "b": {"c": ["x", 2]}, "d.e": "dot", "f": None}
    assert fill("{a}: {b.c} {{{d.e}}}{f}", columns, "prompt") == "4: x\n2 {dot}"
    assert fill("b.c", columns, "prompt") == "x\n2"


def test_tasks_by_a_column():
    columns = {"prompt": "p", "answer": "a", "task": "level"}
    spec = source(columns=columns, tasks={"Level 5": "hard"})
    rows = [{"p": "1", "a": "2", "level": level} for level in ("Level 5", "Level 1")]
    assert [to_record(row, spec, "x").task for row in rows] == ["hard", "t"]
    assert spec.task_names == {"t", "hard"}


def test_think_tags_are_reasoning():
    spec = source(
        "chat",
        columns={"reasoning": "think", "answer": "final"},
        split={"answer": r"(?s)\A(?:<think>(?P<think>.*?)</think>\s*)?(?P<final>.*)\Z"},
    )
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>so</think>\nyes"}]}
    record = to_record(row, spec, "x")
    assert (record.prompt, record.reasoning, record.answer) == ("User: q\n", "so", "yes")


def test_other_names_of_roles():
    chat = Chat(column="c", role="from", content="value", assistant="gpt", turns={"human": "H: {content}\n"})
    columns = {
        "c": [{"from": "human", "value": "a {b}"}, {"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]
    }
    assert conversation(columns, chat) == {"prompt": "H: a {b}\n", "answer": "x"}


QA = {"prompt": "p", "answer": "a"}
REFUSED = [
    ({"p": "q"}, {}, "no column 'a' for answer (has ['p'])"),
    ({"p": " ", "a": "b"}, {}, "prompt is empty"),
    ({"p": "q", "a": None}, {}, "answer is empty"),
    ({"p": "q", "a": "no hash"}, {"split": {"a": "#### (?P<x>.*)"}}, "column 'a' does not match"),
    ({"p": "q", "a": {"b": 1}}, {"columns": {"prompt": "p", "answer": "a.c"}}, "no column 'a.c'"),
    ({"p": "q", "a": "z", "c": ["x", "y"]}, {"columns": {**QA, "choices": "c"}}, "none of the choices"),
    ({"p": "q", "a": "x", "c": "x"}, {"columns": {**QA, "choices": "c"}}, "no list of at least two"),
    (
        {"p": "q", "i": 2, "c": ["x", "y"]},
        {"columns": {"prompt": "p", "choice": "i", "choices": "c"}},
        "choice '2' is none",
    ),
    ({"messages": []}, {"chat": {}, "columns": {"prompt": "prompt", "answer": "answer"}}, "no message of 'assistant'"),
    ({"messages": "x"}, {"chat": {}}, "no list of messages"),
    ({"p": "q", "a": float("nan")}, {}, "column 'a' holds nan"),
    ({"p": "q", "a": [1, float("-inf")]}, {}, "column 'a' holds -inf"),
    ({"p": "q", "a": b"x"}, {}, "column 'a' holds bytes; text, numbers or lists of them are read"),
    ({"p": "q", "a": {"b": 1}}, {}, "column 'a' holds keys ['b']; name one as `a.key`"),
    ({"p": "q", "a": [{"b": 1}]}, {}, "column 'a' holds keys ['b']"),
    ({"p": "half \ud800", "a": "x"}, {}, "column 'p' holds 'half \\ud800', which is no Unicode text"),
    (
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "y"}]},
        {"chat": {}},
        "message 1 in column 'messages' has no 'content' (has ['content', 'role'])",
    ),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "text": "y"}]},
        {"chat": {}},
        "message 2 in column 'messages' has no 'content' (has ['role', 'text'])",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "y"}]},
        {"chat": {}},
        "message 1 in column 'messages' has parts of type image_url; only text is read",
    ),
    (
        {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"chat": {}},
        "role(s) ['tool'] have no entry",
    ),
]


@pytest.mark.parametrize("row, more, said", REFUSED, ids=[said for *_, said in REFUSED])
def test_what_is_no_record_is_refused_in_words(row, more, said):
    with pytest.raises(ValueError) as caught:
        to_record(row, source(**{"columns": QA, **more}), "x")
    assert said in str(caught.value)


def test_a_long_expression_is_not_repeated():
    with pytest.raises(ValueError) as caught:
        to_record(data_zoo.hendrycks(1) | {"solution": "no box " * 40}, source("math"), "x")
    assert "column 'solution' does not match" in str(caught.value) and "which finds final" in str(caught.value)
    assert len(str(caught.value)) < 220


def test_messages_in_parts_are_their_texts():
    parts = [{"type": "text", "text": text} for text in ("a", "b")]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]}
    # what follows the answer is left out, whatever it is
    row["messages"].append({"role": "user", "content": None})
    assert conversation(row, Chat()) == {"prompt": "User: a\nb\n", "answer": "a"}


def test_a_choice_by_its_place():
    spec = source(columns={"prompt": "p", "choice": "i", "choices": "c"})
    assert to_record({"p": "q", "i": 1, "c": ["x", "y", "z"]}, spec, "n").answer == "y"


@pytest.mark.parametrize(
    "more, said",
    [
        ({"split": {"a": "("}}, "no regular expression"),
        ({"tasks": {"x": "y"}}, "go together"),
        ({"columns": {"prompt": "p", "choice": "c"}}, "map these two and no answer"),
        ({"columns": {"prompt": "p", "answer": "a", "labels": "l"}}, "which is not mapped"),
    ],
)
def test_mistakes_in_a_mapping(more, said):
    with pytest.raises(ValueError, match=said):
        source(**more)


def test_a_split_that_no_source_has():
    with pytest.raises(ValueError, match="none has a train split"):
        DataConfig(sources=[{"kind": "hub", "preset": "humaneval", "task": "x"}])

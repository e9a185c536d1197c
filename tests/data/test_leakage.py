"""Leakage and duplicates: by content and by n-gram, whatever the ids, the case, the punctuation and the place say."""

import pytest

from kvpipe.data.leakage import duplicates, leaks, ngrams, words
from kvpipe.data.records import Record


def record(number: int, prompt: str, answer: str = "7", task: str = "math", reasoning: str | None = None) -> Record:
    return Record(f"r{number}", task, prompt, f"because {number}" if reasoning is None else reasoning, answer)


def reasons(train, test, n):
    return [(leak.train, leak.reason) for leak in leaks(train, test, n)]


def test_ngrams_are_windows_of_words():
    assert len(ngrams(words("a b  c\nd"), 3)) == 2
    assert ngrams(words("a b c d"), 3) == ngrams(words("A, b; C. d!"), 3)
    assert ngrams(words("a b"), 3) == set() == ngrams(words("  "), 3)


def test_leaks_by_content_and_by_ngram():
    numbers = "one two three four five six seven eight nine ten"
    test = [record(0, numbers), record(1, "an apple")]
    same = record(5, numbers)
    overlapping = record(6, f"zero {numbers} eleven", "12")
    almost = record(7, "one two three four 5 six seven eight nine", "12")
    other_task = Record("r8", "code", numbers, "", "8")
    short = record(9, "apple", "pie")
    assert reasons([same, overlapping, almost, other_task, short], test, 5) == [
        ("r5", "same content"),
        ("r6", "shared 5-gram"),
        ("r8", "shared 5-gram"),
    ]
    assert [name for name, _ in reasons([overlapping, almost], test, 4)] == ["r6", "r7"]
    assert leaks([overlapping, almost], test, 13) == leaks([overlapping], test, 10)


QUESTION = "Weng earns $12 an hour for baby-sitting. Yesterday, she did 50 minutes: how much did she earn?"


@pytest.mark.parametrize(
    "copy",
    [
        record(1, QUESTION.lower(), "9"),
        record(1, QUESTION.replace(",", "").replace(".", "").replace("?", "").replace(":", ""), "9"),
        record(1, "  ".join(QUESTION.split()), "9"),
        record(1, QUESTION.replace("e", "\uff45"), "9"),
        record(1, "Another one", "9", reasoning=f"I remember: “{QUESTION}”"),
        Record("r1", "math", "Another one", "", "9", teacher_reasoning=QUESTION),
        record(1, "Another one", QUESTION),
        record(1, QUESTION.replace("earn", "ea\u00adrn").replace("e", "e\u200d"), "9"),
    ],
    ids=[
        "lower case",
        "punctuation",
        "white space",
        "full width",
        "reasoning",
        "teacher's reasoning",
        "answer",
        "characters that nobody sees",
    ],
)
def test_a_copy_is_found_however_and_wherever_it_is_written(copy):
    assert [leak.test for leak in leaks([copy], [record(0, QUESTION)], 13)] == ["r0"]


def test_a_fraction_without_its_stroke_is_found():
    question = "Jack had 100. Sophia gave him 1/5 of hers. How many does he have now?"
    for copy in (question, question.replace("/", "").replace(".", ""), question.replace("1/5", "1 / 5")):
        assert reasons([record(1, f"So: {copy}", "9")], [record(0, question)], 13) == [("r1", "shared 13-gram")]


def test_a_short_question_is_found_inside_a_longer_prompt():
    test = [record(0, "How many legs have 3 cats?"), record(2, "Name a cat")]
    assert reasons([record(1, "First: how many legs have 3 cats? Then add 5.", "17")], test, 13) == [
        ("r1", "shared 6-gram")
    ]
    assert leaks([record(1, "Name a cat and a dog", "Tom and Rex")], test, 13) == []


def test_a_question_in_writing_without_spaces_is_found_inside_a_longer_prompt():
    for question, copy in (
        ("小明有三个苹果，又买了五个，他一共有多少个？", "题目：小明有三个苹果, 又买了五个 他一共有多少个"),
        ("太郎は三個のりんごを持っています。いくつありますか。", "問題: 太郎は三個のりんごを持っています いくつ"),
    ):
        assert reasons([record(1, copy, "9")], [record(0, question)], 13) == [("r1", "shared 13-gram")]
    assert words("GPT4模型 2个") == ["gpt4", "模", "型", "2", "个"]


def test_signs_of_arithmetic_are_words():
    assert (
        leaks([record(1, "x = 3; y = x + 4; print y", "7")], [record(0, "x = 3; y = x - 4; print y", "-1")], 13) == []
    )


def test_ids_and_reasoning_of_the_test_do_not_make_a_leak():
    assert leaks([record(1, "what is three plus four")], [record(1, "what is nine minus two")], 4) == []


def test_plain_text_is_compared_by_its_text():
    texts = [Record(f"t{i}", "wiki", "", text, "") for i, text in enumerate(["a b c d", "a b c e", "x a b c"])]
    assert len({t.content_hash() for t in texts}) == 3
    assert reasons(texts[1:], texts[:1], 3) == [("t1", "shared 3-gram"), ("t2", "shared 3-gram")]
    assert leaks(texts[1:], texts[:1], 4) == []


def test_duplicates_name_the_first_of_their_kind():
    rows = [record(0, "one"), record(1, "two"), record(2, "one"), record(3, "one", "8"), record(4, "one")]
    assert duplicates(rows) == [("r2", "r0"), ("r4", "r0")]
    assert duplicates(rows[:2]) == []

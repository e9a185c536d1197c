"""Leakage and duplicates: by content and by n-gram, whatever the ids say."""

from kvpipe.leakage import duplicates, leaks, ngrams
from kvpipe.records import Record


def record(number: int, prompt: str, answer: str = "7", task: str = "math") -> Record:
    return Record(f"r{number}", task, prompt, f"because {number}", answer)


def test_ngrams_are_windows_of_words():
    assert list(ngrams("a b  c\nd", 3)) == [("a", "b", "c"), ("b", "c", "d")]
    assert list(ngrams("a b", 3)) == [("a", "b")]
    assert list(ngrams("  ", 3)) == []


def test_leaks_by_content_and_by_ngram():
    words = "one two three four five six seven eight nine ten"
    train = [record(0, words), record(1, "an apple")]
    same = record(5, words)
    overlapping = record(6, f"zero {words} eleven", "12")
    almost = record(7, "one two three four FIVE six seven eight nine", "12")
    other_task = Record("r8", "code", words, "", "7")
    short = record(9, "apple", "pie")
    assert leaks(train, [same, overlapping, almost, other_task, short], 5) == [
        ("r5", "same content"),
        ("r6", "shared 5-gram"),
        ("r8", "shared 5-gram"),
    ]
    assert [name for name, _ in leaks(train, [overlapping, almost], 4)] == ["r6", "r7"]
    assert leaks(train, [overlapping, almost], 13) == []


def test_ids_and_reasoning_do_not_make_a_leak():
    assert leaks([record(1, "what is three plus four")], [record(1, "what is nine minus two")], 4) == []


def test_plain_text_is_compared_by_its_text():
    texts = [Record(f"t{i}", "wiki", "", text, "") for i, text in enumerate(["a b c d", "a b c e", "x a b c"])]
    assert len({t.content_hash() for t in texts}) == 3
    assert leaks(texts[:1], texts[1:], 3) == [("t1", "shared 3-gram"), ("t2", "shared 3-gram")]
    assert leaks(texts[:1], texts[1:], 4) == []


def test_duplicates_name_the_first_of_their_kind():
    rows = [record(0, "one"), record(1, "two"), record(2, "one"), record(3, "one", "8"), record(4, "one")]
    assert duplicates(rows) == [("r2", "r0"), ("r4", "r0")]
    assert duplicates(rows[:2]) == []

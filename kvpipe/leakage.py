"""What two sets of records have in common: the same content, or a word n-gram of the problem."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvpipe.records import Record


def ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Word n-grams; a text of fewer words is one gram."""
    words = text.split()
    if words:
        for start in range(max(1, len(words) - n + 1)):
            yield tuple(words[start : start + n])


def leaks(train: Iterable[Record], test: Iterable[Record], n: int) -> list[tuple[str, str]]:
    """(test id, reason) of test records whose content hash or an n-gram of prompt + answer occurs in train."""
    train = list(train)
    hashes = {record.content_hash() for record in train}
    grams = {gram for record in train for gram in ngrams(_problem(record), n)}
    found = []
    for record in test:
        if record.content_hash() in hashes:
            found.append((record.id, "same content"))
        elif any(gram in grams for gram in ngrams(_problem(record), n)):
            found.append((record.id, f"shared {n}-gram"))
    return found


def duplicates(records: Iterable[Record]) -> list[tuple[str, str]]:
    """(id, id of the first) of records whose content occurs before."""
    first: dict[str, str] = {}
    found = []
    for record in records:
        earlier = first.setdefault(record.content_hash(), record.id)
        if earlier != record.id:
            found.append((record.id, earlier))
    return found


def _problem(record: Record) -> str:
    """What is asked and answered; plain text has neither, and is all reasoning."""
    return f"{record.prompt} {record.answer}" if record.prompt or record.answer else record.reasoning

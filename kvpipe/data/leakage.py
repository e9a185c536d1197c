"""What a training split has of a test split: the same content, or a word n-gram of a test question anywhere in a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from kvpipe.data.patterns import UNSEEN
from kvpipe.data.records import Record

SHORTEST = 5
"""Words of a question that is searched as a whole; one of fewer words is only compared with whole questions."""
_SIGN = "[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
"""Chinese and Japanese: written without spaces, so that every character counts as a word."""


class Leak(NamedTuple):
    """One pair of records and why it was found."""

    train: str
    test: str
    reason: str


def words(text: str) -> list[str]:
    """The words of a text, whatever its case, punctuation, white space and Unicode form; signs of arithmetic are words, and
    Chinese and Japanese characters."""
    plain = re.sub(UNSEEN, "", unicodedata.normalize("NFKC", text)).casefold().replace("\u2212", "-")
    joined = re.sub(r"(?<=\w)['’.,](?=\w)|(?<=[^\W\d])[-/](?=[^\W\d])", "", plain)  # it's, 1.5, baby-sitting
    return re.findall(rf"{_SIGN}|(?:(?!{_SIGN})[^\W_])+|[+*=<>^&|]|(?<=\s)[-/](?=\s)|(?<=[\w)])[-/](?=\d)", joined)


def ngrams(sequence: list[str], n: int) -> set[int]:
    """Hashes of the windows of `n` words, the same within one process; none where there are fewer."""
    return {hash(tuple(sequence[start : start + n])) for start in range(len(sequence) - n + 1)}


def leaks(train: Iterable[Record], test: Iterable[Record], n: int) -> list[Leak]:
    """Pairs of a training and a test record with equal content, or with an n-gram of the test question (its prompt; of plain
    text its text) anywhere in the training record: in its prompt, either reasoning or its answer.

    A question of fewer than n words counts as one gram. Memory follows the test split alone, some 150 to 300 bytes a word of it,
    and not the training split, which is read once: a million training records cost no more than a thousand.
    """
    hashes: dict[str, str] = {}
    grams: dict[int, dict[int, str]] = {}
    for record in test:
        hashes.setdefault(_content(record), record.id)
        written = record.prompt or record.reasoning
        for question in (words(written), words(re.sub(r"[^\w\s]", "", written))):  # 1/3 without its stroke is 13
            length = min(n, len(question))
            if length >= min(n, SHORTEST):
                for gram in ngrams(question, length):
                    grams.setdefault(length, {}).setdefault(gram, record.id)
    found = []
    for record in train:
        if same := hashes.get(_content(record)):
            found.append(Leak(record.id, same, "same content"))
            continue
        text = words("\n".join((record.prompt, record.reasoning, record.teacher_reasoning or "", record.answer)))
        for length in sorted(grams, reverse=True):
            if shared := ngrams(text, length) & grams[length].keys():
                found.append(Leak(record.id, min(grams[length][gram] for gram in shared), f"shared {length}-gram"))
                break
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


def _content(record: Record) -> str:
    """What is asked and answered, in words; plain text has neither, and is all reasoning."""
    return " ".join(words(f"{record.prompt} {record.answer}" if record.prompt or record.answer else record.reasoning))

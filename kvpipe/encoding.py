"""All texts of a split under one tokenizer, as flat arrays: the form in which alignment is vectorised."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int64

from kvpipe.config import Template
from kvpipe.records import Reading, Record, render
from kvpipe.segments import Segmented, token_segments
from kvpipe.tokens import encode

SEGMENTS = 3


@dataclass(frozen=True)
class Encoding:
    """Tokens of many examples, one after the other; a *row* is one token.

    `offsets[e] : offsets[e + 1]` are the rows of example `e`; `segments` are row ranges relative to the example,
    `byte_segments` byte ranges relative to its text.
    """

    ids: Int64[np.ndarray, "row"]
    spans: Int64[np.ndarray, "row 2"]
    offsets: Int64[np.ndarray, "example_plus_one"]
    segments: Int64[np.ndarray, "example 3 2"]
    byte_segments: Int64[np.ndarray, "example 3 2"]
    segment_hashes: Int64[np.ndarray, "example 3"]
    texts: tuple[Segmented, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int64[np.ndarray, "example"]:
        """Tokens per example."""
        return np.diff(self.offsets)

    def rows(self, example: SupportsIndex) -> slice:
        """The rows of one example."""
        return slice(int(self.offsets[example]), int(self.offsets[int(example) + 1]))


def encode_records(
    records: list[Record],
    tokenizer,
    template: Template,
    reading: Reading = "student",
    end: bool = False,
    max_length: int | None = None,
) -> Encoding:
    """Tokenize the whole text of every record once.

    Args:
        records: the examples, in order.
        tokenizer: a fast tokenizer.
        template: record → text.
        reading: the student's text or the teacher's own.
        end: append the end-of-text token (an empty span), so that a model learns to stop.
        max_length: longest allowed example in tokens.

    Raises:
        ValueError: an example is longer than `max_length` (names it and its length), or `end` and the tokenizer has no
            end-of-text token.
    """
    if end and tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path or 'the tokenizer'} has no end-of-text token (eos_token): name one")
    ids, spans, segments, byte_segments, hashes, texts = [], [], [], [], [], []
    for record in records:
        text = render(record, template, reading)
        tokens = encode(tokenizer, text.text)
        these, span = tokens.ids.numpy(), tokens.spans.numpy()
        ranges = token_segments(tokens.spans, text.boundaries)
        if end:
            these = np.append(these, tokenizer.eos_token_id)
            span = np.concatenate([span, np.full((1, 2), text.boundaries[-1])])
        if max_length is not None and len(these) > max_length:
            raise ValueError(
                f"record {record.id!r} has {len(these)} tokens, train.max_length is {max_length}: "
                "raise it or shorten the record"
            )
        ids.append(these)
        spans.append(span)
        segments.append(ranges)
        byte_segments.append(list(pairwise(text.boundaries)))
        texts.append(text)
        hashes.append([hash_bytes(segment.encode()) for segment in text])
    lengths = np.array([len(x) for x in ids], dtype=np.int64)
    return Encoding(
        ids=np.concatenate(ids).astype(np.int64),
        spans=np.concatenate(spans).astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        segments=np.array(segments, dtype=np.int64).reshape(len(records), SEGMENTS, 2),
        byte_segments=np.array(byte_segments, dtype=np.int64).reshape(len(records), SEGMENTS, 2),
        segment_hashes=np.array(hashes, dtype=np.int64).reshape(len(records), SEGMENTS),
        texts=tuple(texts),
    )


def hash_bytes(raw: bytes) -> int:
    """A 63-bit content hash that is the same in every process."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big") >> 1


def concatenated_ranges(starts: Int64[np.ndarray, "n"], stops: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "total"]:
    """`start, start + 1, …, stop - 1` of every pair, one after the other."""
    lengths = stops - starts
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)

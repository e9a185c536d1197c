"""Prompt | reasoning | answer, turn by turn: where the segments of a text lie, in bytes and in tokens.

Segments come from a dataset's own fields (`Segmented`); `token_segments` says which tokens of one tokenization each of them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from jaxtyping import Int64

NAMES = ("prompt", "reasoning", "answer")


class Segmented(tuple[str, ...]):
    """The segments of a record, any of which may be empty: prompt, reasoning and answer, and so on for every turn of a
    conversation. `text` is their concatenation."""

    def __new__(cls, prompt: str = "", reasoning: str = "", answer: str = "", *more: str) -> Segmented:
        """Of one turn, and in threes of later ones."""
        return super().__new__(cls, (prompt, reasoning, answer, *more))

    @property
    def prompt(self) -> str:
        """What comes before the last reasoning and answer."""
        return "".join(self[:-2])

    @property
    def reasoning(self) -> str:
        """Of the last turn."""
        return self[-2]

    @property
    def answer(self) -> str:
        """Of the last turn."""
        return self[-1]

    @property
    def text(self) -> str:
        """What is tokenized, whole."""
        return "".join(self)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Byte positions where the segments begin, and where the last one ends: (0, …, bytes of the text)."""
        return tuple(accumulate((len(part.encode("utf-8")) for part in self), initial=0))


def token_segments(spans: Int64[np.ndarray, "time 2"], boundaries: Sequence[int]) -> list[tuple[int, int]]:
    """Token range (start, stop) of each segment, from the byte boundaries (0, …, bytes of the text).

    A token belongs to the segment in which it *ends*, as in a causal model: one that straddles a boundary has
    read into the later segment. So the ranges are contiguous and ordered and hold every token that has bytes;
    a segment without a token of its own has start == stop. Special tokens before the first and after the last
    token with bytes (BOS, EOS) lie outside all ranges; an empty span between two tokens goes with the earlier one.
    """
    stops = spans[:, 1]
    with_bytes = np.flatnonzero(stops > spans[:, 0])
    edges = np.asarray(boundaries)
    end = int(stops[with_bytes[-1]]) if with_bytes.size else 0
    if len(edges) < 2 or edges[0] != 0 or (np.diff(edges) < 0).any() or edges[-1] != end:
        raise ValueError(
            f"boundaries must rise from 0 to the {end} bytes that the spans cover, got {list(boundaries)}; "
            "take them from the text that was tokenized"
        )
    if not with_bytes.size:
        return [(0, 0)] * (len(edges) - 1)
    ended = np.searchsorted(stops[with_bytes], edges, side="right")  # tokens that end by each boundary
    cuts = np.append(with_bytes, with_bytes[-1] + 1)[ended].tolist()
    return list(pairwise(cuts))

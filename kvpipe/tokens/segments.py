"""Prompt | reasoning | answer: where the three segments of a text lie, in bytes and in tokens.

Segments come from a dataset's own fields (`Segmented`) or from marker strings in raw text (`split_reasoning`);
`token_segments` then says which tokens of one tokenization each of them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64
from torch import Tensor

NAMES = ("prompt", "reasoning", "answer")


class Segmented(NamedTuple):
    """The three segments of a record; `text` is their concatenation, any of them may be empty."""

    prompt: str = ""
    reasoning: str = ""
    answer: str = ""

    @property
    def text(self) -> str:
        """What is tokenized, whole."""
        return self.prompt + self.reasoning + self.answer

    @property
    def boundaries(self) -> tuple[int, int, int, int]:
        """Byte positions where the segments begin, and where the last one ends: (0, …, bytes of the text)."""
        prompt, reasoning, answer = (len(part.encode("utf-8")) for part in self)
        return 0, prompt, prompt + reasoning, prompt + reasoning + answer


def token_segments(spans: Int64[Tensor, "time 2"], boundaries: Sequence[int]) -> list[tuple[int, int]]:
    """Token range (start, stop) of each segment, from the byte boundaries (0, …, bytes of the text).

    A token belongs to the segment in which it *ends*, as in a causal model: one that straddles a boundary has
    read into the later segment. So the ranges are contiguous and ordered and hold every token that has bytes;
    a segment without a token of its own has start == stop. Special tokens before the first and after the last
    token with bytes (BOS, EOS) lie outside all ranges; an empty span between two tokens goes with the earlier one.
    """
    stops = spans[:, 1].cpu().numpy()
    with_bytes = np.flatnonzero(stops > spans[:, 0].cpu().numpy())
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


@dataclass(frozen=True)
class Markers:
    """Strings that part raw text. Every marker stays in the text, so nothing the model writes is lost."""

    prompt_stop: str | None = None
    """Ends the prompt (first occurrence, the marker included); must occur. None: the prompt ends where
    `reasoning_start` begins, or is empty."""
    reasoning_start: str | None = None
    """Opens the reasoning (the marker included)."""
    reasoning_stop: str | None = None
    """Closes the reasoning (last occurrence, the marker included). Absent after a start: all that follows is
    reasoning (a generation that was cut off)."""
    answer_start: str | None = None
    """Opens the answer (last occurrence after the closed reasoning; what stands between is reasoning too)."""
    unmarked: Literal["error", "reasoning", "answer"] = "error"
    """What text after the prompt is when none of the markers above occurs in it."""


THINK = Markers(reasoning_start="<think>", reasoning_stop="</think>", unmarked="answer")
"""`<think>…</think>` answer; text without the tags is all answer."""
GSM8K = Markers(answer_start="####")
"""GSM8K's answer column: worked solution, `#### number`."""


def split_reasoning(text: str, markers: Markers) -> Segmented:
    """Part raw text at its markers; the three parts joined are the text again, byte for byte.

    Raises `ValueError` naming the marker when `prompt_stop` is absent, or when none of the other markers occurs and
    `unmarked` is "error".
    """
    begin = 0
    if markers.prompt_stop is not None:
        begin = text.find(markers.prompt_stop)
        if begin < 0:
            raise ValueError(f"prompt_stop {markers.prompt_stop!r} is not in the text {_shown(text)}")
        begin += len(markers.prompt_stop)

    opened = -1 if markers.reasoning_start is None else text.find(markers.reasoning_start, begin)
    if opened >= 0 and markers.prompt_stop is None:
        begin = opened
    closed = -1 if markers.reasoning_stop is None else text.rfind(markers.reasoning_stop, max(begin, opened))
    stop = closed + len(markers.reasoning_stop or "") if closed >= 0 else begin
    answer = -1 if markers.answer_start is None else text.rfind(markers.answer_start, stop)

    if answer >= 0:
        stop = answer
    elif closed < 0 and (opened >= 0 or markers.unmarked == "reasoning"):
        stop = len(text)
    elif closed < 0 and markers.unmarked == "error" and begin < len(text):
        wanted = [m for m in (markers.reasoning_start, markers.reasoning_stop, markers.answer_start) if m]
        raise ValueError(
            f"none of the markers {wanted} is in the text {_shown(text[begin:])}; set Markers(unmarked=…) to "
            '"reasoning" or "answer" if such texts are expected'
        )
    return Segmented(text[:begin], text[begin:stop], text[stop:])


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")

"""Which teacher tokens make up each student token, for a whole split at once.

The flat form of `kvpipe.data.encoding` lets one call of `overlap` or `segment_weights` serve all examples: byte spans are
shifted so that every example (or every segment) has a byte range of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from kvpipe.align.anchor import anchors, warp
from kvpipe.align.time import segment_weights, weight_mask
from kvpipe.config import TimeConfig
from kvpipe.data.encoding import Encoding
from kvpipe.tokens.matrix import gather_form, overlap


@dataclass(frozen=True)
class TimeMap:
    """Gather form over flat rows: student row i = Σ_m weight[i, m] · teacher row index[i, m].

    `source[e]` is the example whose teacher rows example `e` reads (itself, but for the shuffled null).
    """

    index: Int64[Tensor, "dst_row entry"]
    weight: Float32[Tensor, "dst_row entry"]
    source: Int64[np.ndarray, "example"]

    @property
    def mask(self) -> Bool[Tensor, "dst_row"]:
        """True where a student token has a target."""
        return weight_mask(self.weight)


def build_time_map(config: TimeConfig, src: Encoding, dst: Encoding, source: np.ndarray | None = None) -> TimeMap:
    """Align all examples of a split.

    Args:
        config: `position` needs both sides to have read the same text; where two chat templates make texts differ,
            `overlap` keeps borders too.
        src: the teacher's tokens.
        dst: the student's tokens.
        source: for every student example the teacher example it reads; itself by default. For examples that read
            another one, all segments count as different.

    Under `segment`, a segment whose text is the same on both sides is aligned by its bytes, which is exact; only
    segments that differ are resampled, by linear interpolation over normalised position or between anchors.
    """
    identity = np.arange(len(dst))
    source = identity if source is None else source
    own = source == identity
    if config.kind == "position":
        index, weight = _by_position(src, dst, source)
    elif (
        config.kind == "overlap"
        and config.borders == "cross"
        and own.all()
        and (src.segment_hashes == dst.segment_hashes).all()
    ):
        groups = np.stack([np.zeros(len(dst), np.int64), dst.byte_segments[:, -1, 1]], axis=1)[:, None]
        same_text = np.ones((len(dst), 1), dtype=bool)
        index, weight = _by_bytes(config, src, dst, groups, groups, same_text)
        index, weight = _within(index, weight, *_rows_read(src, dst, source))
    else:
        same_text = (src.segment_hashes[source] == dst.segment_hashes) & own[:, None]
        index, weight = _by_bytes(config, src, dst, src.byte_segments, dst.byte_segments, same_text)
        index, weight = _within(index, weight, *_segment_rows_read(src, dst, source))
        if config.differing == "interpolate":
            resampled = _by_segment(src, dst, source, ~same_text)
        else:
            resampled = _by_anchors(src, dst, source, ~same_text, predictive=config.differing == "predictive")
        # a token without text has no target, as where texts are the same
        with_text = torch.from_numpy(dst.spans[:, 1] > dst.spans[:, 0])[:, None]
        index, weight = _merge((index, weight), (resampled[0], resampled[1] * with_text))
    # where there is no weight any row of the example will do
    first, _ = _rows_read(src, dst, source)
    return TimeMap(torch.where(weight > 0, index, first), weight, source)


def derangement(tasks: list[str], seed: int) -> Int64[np.ndarray, "example"]:
    """For every example another one of the same task, by a seeded cyclic shift of a shuffle.

    Raises:
        ValueError: a task has a single example.
    """
    rng = np.random.default_rng(seed)
    out = np.empty(len(tasks), dtype=np.int64)
    names = np.array(tasks)
    for task in sorted(set(tasks)):
        members = rng.permutation(np.flatnonzero(names == task))
        if len(members) < 2:
            raise ValueError(f"shuffle_teacher needs at least two training examples of task {task!r}")
        out[members] = np.roll(members, 1)
    return out


def _by_position(src: Encoding, dst: Encoding, source: np.ndarray) -> tuple[Tensor, Tensor]:
    example = np.repeat(np.arange(len(dst)), dst.lengths)
    local = np.arange(len(dst.ids)) - dst.offsets[example]
    has_text = dst.spans[:, 1] > dst.spans[:, 0]
    inside = (local < src.lengths[source[example]]) & has_text
    index = np.where(inside, src.offsets[source[example]] + local, 0)
    return torch.from_numpy(index[:, None]), torch.from_numpy(inside[:, None].astype(np.float32))


def _by_bytes(
    config: TimeConfig, src: Encoding, dst: Encoding, src_groups: np.ndarray, dst_groups: np.ndarray, keep: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Overlap inside byte groups (whole texts or segments) that are equal on both sides; others stay empty."""
    # room for the longer side, so that spans stay in order also in groups that differ
    lengths = np.maximum(np.diff(src_groups, axis=-1), np.diff(dst_groups, axis=-1))[..., 0] + 1
    base = (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape)
    src_spans = _shifted(src, src_groups, base, keep)
    dst_spans = _shifted(dst, dst_groups, base, keep)
    return gather_form(overlap(src_spans, dst_spans, mode=config.mode))


def _shifted(encoding: Encoding, groups: np.ndarray, base: np.ndarray, keep: np.ndarray) -> Tensor:
    """Spans moved to their group's byte range; tokens of groups that are left out become empty."""
    example = np.repeat(np.arange(len(encoding)), encoding.lengths)
    spans = encoding.spans
    # a token belongs to the group in which it ends
    stops = groups[example, :, 1]
    group = np.minimum((spans[:, 1:] > stops).sum(1), groups.shape[1] - 1)
    start, stop = groups[example, group, 0], groups[example, group, 1]
    shifted = np.clip(spans, start[:, None], stop[:, None]) - start[:, None] + base[example, group][:, None]
    dropped = ~keep[example, group]
    shifted[dropped, 1] = shifted[dropped, 0]
    return torch.from_numpy(shifted)


def shared_spans(src: Encoding, dst: Encoding) -> tuple[Tensor, Tensor]:
    """Spans of both sides with a byte range of its own for every segment; tokens of segments that differ are empty."""
    same = src.segment_hashes == dst.segment_hashes
    lengths = np.maximum(np.diff(src.byte_segments, axis=-1), np.diff(dst.byte_segments, axis=-1))[..., 0] + 1
    base = (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape)
    return _shifted(src, src.byte_segments, base, same), _shifted(dst, dst.byte_segments, base, same)


def _by_segment(src: Encoding, dst: Encoding, source: np.ndarray, resample: np.ndarray) -> tuple[Tensor, Tensor]:
    """Linear interpolation for the marked segments (example, segment)."""
    examples, segments = np.nonzero(resample)
    src_ranges = src.segments[source[examples], segments] + src.offsets[source[examples], None]
    dst_ranges = dst.segments[examples, segments] + dst.offsets[examples, None]
    return segment_weights(src_ranges.tolist(), dst_ranges.tolist(), len(dst.ids))


def _by_anchors(
    src: Encoding, dst: Encoding, source: np.ndarray, resample: np.ndarray, predictive: bool
) -> tuple[Tensor, Tensor]:
    """For each token of the marked segments, the last teacher token that ends by the anchored position of its own end;
    `predictive`: by that of the word that comes next, all that the teacher says before it included."""
    index = np.zeros((len(dst.ids), 1), dtype=np.int64)
    weight = np.zeros((len(dst.ids), 1), dtype=np.float32)
    for example, segment in zip(*np.nonzero(resample), strict=True):
        ends, rows = [], []
        for side, number in ((src, source[example]), (dst, example)):
            these = np.arange(*(side.segments[number, segment] + side.offsets[number]))
            these = these[side.spans[these, 1] > side.spans[these, 0]]
            ends.append(side.spans[these, 1] - side.byte_segments[number, segment, 0])
            rows.append(these)
        pairs = anchors(src.texts[source[example]][segment], dst.texts[example][segment])
        if predictive:
            reached = warp(_next_words(dst.texts[example][segment].encode(), ends[1]), pairs, jump="after")
        else:
            reached = warp(ends[1], pairs)
        # a little slack for the rounding of the interpolation
        last = np.searchsorted(ends[0], reached + 1e-6, side="right") - 1
        if len(rows[0]):
            index[rows[1], 0] = rows[0][np.maximum(last, 0)]
            weight[rows[1], 0] = last >= 0
    return torch.from_numpy(index), torch.from_numpy(weight)


def _next_words(text: bytes, ends: np.ndarray) -> np.ndarray:
    """Where what follows each token begins: the end of the token, and past the blanks that the next one begins with."""
    out = ends.copy()
    for i, (start, stop) in enumerate(pairwise(ends)):
        piece = text[start:stop]
        word = piece.lstrip(b" ")
        out[i] += len(piece) - len(word) if word else 0
    return out


def _merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of two disjoint gather forms in one."""
    width = max(first[0].shape[1], second[0].shape[1])
    padded = [[torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in pair] for pair in (first, second)]
    rows = weight_mask(second[1])[:, None]
    return (
        torch.where(rows, padded[1][0], padded[0][0]),
        torch.where(rows, padded[1][1], padded[0][1]),
    )


def _rows_read(src: Encoding, dst: Encoding, source: np.ndarray) -> tuple[Tensor, Tensor]:
    """For every student row the first and last-plus-one teacher row of the example that it reads, as columns."""
    read = np.repeat(source, dst.lengths)
    return torch.from_numpy(src.offsets[read])[:, None], torch.from_numpy(src.offsets[read + 1])[:, None]


def _segment_rows_read(src: Encoding, dst: Encoding, source: np.ndarray) -> tuple[Tensor, Tensor]:
    """The same for the segment that it reads."""
    example = np.repeat(np.arange(len(dst)), dst.lengths)
    local = np.arange(len(dst.ids)) - dst.offsets[example]
    segment = np.minimum((local[:, None] >= dst.segments[example, :, 1]).sum(1), dst.segments.shape[1] - 1)
    read = source[example]
    low, high = (src.offsets[read, None] + src.segments[read, segment]).T
    return torch.from_numpy(low)[:, None], torch.from_numpy(high)[:, None]


def _within(index: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Drop entries outside the rows read: the last token that ended before a text (or a segment) began is not its own."""
    weight = weight * ((index >= low) & (index < high))
    total = weight.sum(1, keepdim=True)
    return index, torch.where(total > 0, weight / total.clamp(min=1e-12), weight)

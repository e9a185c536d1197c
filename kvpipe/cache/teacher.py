"""A teacher as the training loop sees it: what it says at the student's positions, from the store or computed live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kvpipe.align.time import gather_time, weight_mask
from kvpipe.align.timemap import TimeMap, shared_spans
from kvpipe.cache.forward import Keep, forward_rows
from kvpipe.cache.store import Store
from kvpipe.data.encoding import Encoding, concatenated_ranges

COLUMNS = ("keys", "values", "hidden", "states", "nll")
"""What there is of every teacher token: caches and inputs `(row, layer, …)` of some layers, final state, nats."""


@runtime_checkable
class RowSource(Protocol):
    """Where the rows (teacher tokens) of some examples come from."""

    layers: tuple[int, ...]
    """Teacher layers of `keys` and `values`."""
    hidden: tuple[int, ...]
    """Teacher layers of `hidden`."""

    def fetch(self, examples: Int64[np.ndarray, "example"], columns: Sequence[str]) -> Mapping[str, Tensor]:
        """Columns of the examples' tokens, in order, in float32."""
        ...


class StoredRows:
    """Rows from a store."""

    def __init__(self, store: Store, offsets: Int64[np.ndarray, "example_plus_one"]):
        self.store, self.offsets = store, offsets
        self.layers, self.hidden = store.layers, tuple(store.index["key"].get("hidden", ()))

    def fetch(self, examples: Int64[np.ndarray, "example"], columns: Sequence[str]) -> Mapping[str, Tensor]:
        """Columns from the memory map."""
        rows = torch.from_numpy(concatenated_ranges(self.offsets[examples], self.offsets[examples + 1]))
        return {name: self.store.rows(name, rows).float() for name in columns}


class LiveRows:
    """Rows computed by the teacher when they are asked for; the same tensors as a store's, unrounded."""

    def __init__(
        self,
        model,
        encoding: Encoding,
        layers: tuple[int, ...],
        pad_id: int,
        batch_size: int,
        hidden: tuple[int, ...] = (),
    ):
        self.model, self.encoding, self.layers, self.hidden = model, encoding, layers, hidden
        self.pad_id, self.batch_size = pad_id, batch_size

    def fetch(self, examples: Int64[np.ndarray, "example"], columns: Sequence[str]) -> Mapping[str, Tensor]:
        """Columns from forwards of at most `batch_size` examples."""
        keep = Keep(
            layers=self.layers if {"keys", "values"} & set(columns) else (),
            hidden=self.hidden if "hidden" in columns else (),
            states="states" in columns,
            nll="nll" in columns,
        )
        found = forward_rows(self.model, self.encoding, examples, keep, self.batch_size, self.pad_id).named()
        return {name: found[name] for name in columns}


@dataclass(frozen=True)
class Aligned:
    """What a teacher says at the student's positions; `mask` is True where there is a target."""

    mask: Bool[Tensor, "batch time"]
    columns: dict[str, Tensor]
    """`(batch, time, …)`; of `nll` the nats of the bytes that each student token stands for, and with it `ends`, 1 where a
    teacher's token ends at the same byte."""
    loss: Float[Tensor, "batch"] | None = None
    """Nats of the text that was read, where `nll` was asked for."""

    def __add__(self, other: Aligned) -> Aligned:
        """Of both batches, one below the other."""
        columns = {name: torch.cat([x, other.columns[name]]) for name, x in self.columns.items()}
        loss = None if self.loss is None or other.loss is None else torch.cat([self.loss, other.loss])
        return Aligned(torch.cat([self.mask, other.mask]), columns, loss)

    @property
    def keys(self) -> Float[Tensor, "batch time layer head dim"]:
        """Of the teacher's stored layers."""
        return self.columns["keys"]

    @property
    def values(self) -> Float[Tensor, "batch time layer head dim"]:
        """Of the teacher's stored layers."""
        return self.columns["values"]


class AlignedTeacher:
    """One teacher's rows through one time map.

    Args:
        name: the teacher's.
        source: of its rows.
        src: its tokens.
        dst: the student's.
        time: from one to the other.
    """

    def __init__(self, name: str, source: RowSource, src: Encoding, dst: Encoding, time: TimeMap):
        self.name, self.source, self.src, self.dst, self.time = name, source, src, dst, time

    @property
    def layers(self) -> tuple[int, ...]:
        """Teacher layers of the rows."""
        return self.source.layers

    @cached_property
    def _spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Of both sides, with bytes of their own for every segment."""
        src, dst = shared_spans(self.src, self.dst)
        return src.numpy(), dst.numpy()

    def aligned(
        self, examples: Int64[np.ndarray, "batch"], length: int, columns: Sequence[str] = ("keys", "values")
    ) -> Aligned:
        """Columns for a batch, padded to `length` positions."""
        src_offsets, dst_offsets = self.src.offsets, self.dst.offsets
        read = self.time.source[examples]
        found = self.source.fetch(read, columns)
        starts = np.concatenate([[0], np.cumsum(self.src.lengths[read])])
        shift = starts[:-1] - src_offsets[read]
        dst_lengths = self.dst.lengths[examples]
        rows = concatenated_ranges(dst_offsets[examples], dst_offsets[examples + 1])
        batch = np.repeat(np.arange(len(examples)), dst_lengths)
        place = torch.from_numpy(batch * length + concatenated_ranges(np.zeros_like(dst_lengths), dst_lengths))
        entries = self.time.index.shape[1]
        index = torch.zeros(len(examples) * length, entries, dtype=torch.int64)
        weight = torch.zeros(len(examples) * length, entries)
        index[place] = self.time.index[rows] + torch.from_numpy(shift[batch])[:, None]
        weight[place] = self.time.weight[rows]
        index = torch.where(weight > 0, index, 0)
        out = {
            name: gather_time(x.flatten(1), index, weight).reshape(len(examples), length, *x.shape[1:])
            for name, x in found.items()
            if name != "nll"
        }
        loss = None
        if "nll" in found:
            parts = found["nll"].split(self.src.lengths[read].tolist())
            loss = torch.stack([part.sum() for part in parts])
            out["nll"], out["ends"] = torch.zeros(len(examples), length), torch.zeros(len(examples), length)
            src_spans, dst_spans = self._spans
            for row, (example, other, nats) in enumerate(zip(examples, read, parts, strict=True)):
                ours, theirs = dst_spans[self.dst.rows(example)], src_spans[self.src.rows(other)]
                out["nll"][row, : len(ours)] = torch.from_numpy(nats_of_spans(nats.numpy(), theirs, ours))
                shared = np.isin(ours[:, 1], theirs[:, 1]) & (ours[:, 1] > ours[:, 0])
                out["ends"][row, : len(ours)] = torch.from_numpy(shared.astype(np.float32))
        return Aligned(weight_mask(weight).reshape(len(examples), length), out, loss)


def nats_of_spans(
    nats: Float[np.ndarray, "src_time"],
    src_spans: Int64[np.ndarray, "src_time 2"],
    dst_spans: Int64[np.ndarray, "dst_time 2"],
) -> Float[np.ndarray, "dst_time"]:
    """Nats of the source tokens shared out over the bytes they stand for, and added up over each destination token's.

    Both spans are of one text. A source token without bytes (BOS, a space that the tokenizer invents) counts with the next
    one that has some; so all adds up to the same sum, but for what ends the text without bytes.
    """
    with_bytes = src_spans[:, 1] > src_spans[:, 0]
    if not with_bytes.any():
        return np.zeros(len(dst_spans), np.float32)
    after = np.cumsum(nats)[with_bytes]
    # between the segments of a text there may be bytes that no token has
    places = src_spans[with_bytes].flatten()
    told = np.stack([np.concatenate([[0], after[:-1]]), after], axis=1).flatten()
    start, stop = (np.interp(dst_spans[:, side], places, told) for side in (0, 1))
    return (stop - start).astype(np.float32)

"""A teacher as the training loop sees it: its cache on the student's positions, from the store or computed live."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from kvpipe.align.time import gather_time, weight_mask
from kvpipe.align.timemap import TimeMap
from kvpipe.cache.capture import Recorder, kv_geometry
from kvpipe.cache.forward import forward_rows
from kvpipe.cache.store import Store
from kvpipe.data.batches import collate
from kvpipe.data.encoding import Encoding, concatenated_ranges
from kvpipe.models.head import Head, final_states

Cache = Float[Tensor, "row layer head dim"]


@runtime_checkable
class RowSource(Protocol):
    """Where the rows (teacher tokens) of some examples come from."""

    layers: tuple[int, ...]

    def fetch(self, examples: Int64[np.ndarray, "example"]) -> tuple[Tensor, Tensor]:
        """Keys and values `(row, layer, head, dim)` of the examples' tokens, in order, float32."""
        ...


class StoredRows:
    """Rows from a store."""

    def __init__(self, store: Store, offsets: Int64[np.ndarray, "example_plus_one"]):
        self.store, self.offsets = store, offsets
        self.layers = store.layers

    def fetch(self, examples: Int64[np.ndarray, "example"]) -> tuple[Tensor, Tensor]:
        """Keys and values from the memory map."""
        rows = torch.from_numpy(concatenated_ranges(self.offsets[examples], self.offsets[examples + 1]))
        return self.store.rows("keys", rows), self.store.rows("values", rows)


class LiveRows:
    """Rows computed by the teacher when they are asked for; the same tensors as a store's, unrounded."""

    def __init__(self, model, encoding: Encoding, layers: tuple[int, ...], pad_id: int, batch_size: int):
        self.model, self.encoding, self.layers, self.pad_id = model, encoding, layers, pad_id
        self.batch_size = batch_size

    def fetch(self, examples: Int64[np.ndarray, "example"]) -> tuple[Tensor, Tensor]:
        """Keys and values from forwards of `batch_size` examples."""
        found = forward_rows(self.model, self.encoding, examples, self.layers, self.batch_size, self.pad_id)
        return found.keys, found.values


class HiddenRows:
    """What enters each layer, in the place of its keys and values (one head as wide as the model): for similarity."""

    def __init__(self, model, encoding: Encoding, pad_id: int):
        self.model, self.encoding, self.pad_id, self.head = model, encoding, pad_id, Head.of(model)
        self.layers = tuple(range(kv_geometry(model.config).layers))

    @torch.no_grad()
    def fetch(self, examples: Int64[np.ndarray, "example"]) -> tuple[Tensor, Tensor]:
        """Hidden states from one forward, twice."""
        batch = collate(self.encoding, examples, self.pad_id).to(next(self.model.parameters()).device)
        with Recorder(self.model, hidden=True) as recorder:
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            final_states(self.model, self.head, **inputs)
        hidden = rearrange(recorder.hidden_states(), "layer batch time width -> batch time layer 1 width")[batch.mask]
        hidden = hidden.float().cpu()
        return hidden, hidden


@dataclasses.dataclass(frozen=True)
class Aligned:
    """A teacher's cache at the student's positions; `mask` is True where there is a target."""

    keys: Float[Tensor, "batch time layer head dim"]
    values: Float[Tensor, "batch time layer head dim"]
    mask: Bool[Tensor, "batch time"]


class AlignedTeacher:
    """One teacher's rows through one time map."""

    def __init__(self, name: str, source: RowSource, src_offsets: np.ndarray, dst_offsets: np.ndarray, time: TimeMap):
        self.name, self.source, self.time = name, source, time
        self.src_offsets, self.dst_offsets = src_offsets, dst_offsets

    @property
    def layers(self) -> tuple[int, ...]:
        """Teacher layers of the rows."""
        return self.source.layers

    def aligned(self, examples: Int64[np.ndarray, "batch"], length: int) -> Aligned:
        """The cache for a batch, padded to `length` positions."""
        read = self.time.source[examples]
        keys, values = self.source.fetch(read)
        starts = np.concatenate([[0], np.cumsum(np.diff(self.src_offsets)[read])])[:-1]
        shift = starts - self.src_offsets[read]
        dst_lengths = np.diff(self.dst_offsets)[examples]
        rows = concatenated_ranges(self.dst_offsets[examples], self.dst_offsets[examples + 1])
        batch = np.repeat(np.arange(len(examples)), dst_lengths)
        place = torch.from_numpy(batch * length + concatenated_ranges(np.zeros_like(dst_lengths), dst_lengths))
        entries = self.time.index.shape[1]
        index = torch.zeros(len(examples) * length, entries, dtype=torch.int64)
        weight = torch.zeros(len(examples) * length, entries)
        index[place] = self.time.index[rows] + torch.from_numpy(shift[batch])[:, None]
        weight[place] = self.time.weight[rows]
        index = torch.where(weight > 0, index, 0)

        def gather(x: Cache) -> Tensor:
            return gather_time(x.flatten(1), index, weight).reshape(len(examples), length, *x.shape[1:])

        return Aligned(gather(keys), gather(values), weight_mask(weight).reshape(len(examples), length))

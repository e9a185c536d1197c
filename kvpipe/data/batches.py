"""Batches: which examples go into which optimizer step, and how they are padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from kvpipe.config import LossOn
from kvpipe.data.encoding import Encoding

IGNORE = -100
"""Label of positions without loss, as in transformers."""
POOL = 16
"""Batches that are sorted by length together: larger pads less and mixes lengths less."""


@dataclass(frozen=True)
class Batch:
    """Right-padded examples. `positions` count from 0 in every example."""

    examples: Int64[np.ndarray, "batch"]
    input_ids: Int64[Tensor, "batch time"]
    attention_mask: Int64[Tensor, "batch time"]
    labels: Int64[Tensor, "batch time"]

    @property
    def mask(self) -> Bool[Tensor, "batch time"]:
        """True on real tokens."""
        return self.attention_mask.bool()

    @property
    def predicted(self) -> Bool[Tensor, "batch time"]:
        """True on tokens that carry cross-entropy: those with a label, but for the first, which nothing predicts."""
        counted = self.labels != IGNORE
        counted[:, 0] = False
        return counted

    def __getitem__(self, some: slice) -> Batch:
        """Some of the examples, as long as they are."""
        return Batch(self.examples[some], self.input_ids[some], self.attention_mask[some], self.labels[some])

    def to(self, device) -> Batch:
        """The tensors on another device."""
        return Batch(self.examples, self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def schedule(
    lengths: Int64[np.ndarray, "example"], batch_size: int, steps: int, seed: int, by_length: bool
) -> list[Int64[np.ndarray, "batch"]]:
    """The examples of every optimizer step: a seeded order without end, cut into full batches.

    After every batch the visits of any two examples differ by at most 1, and no batch has an example twice: what an
    epoch leaves over is the beginning of the next epoch's first batch, which is filled up with others.

    With `by_length`, an epoch's shuffle is cut into pools of `POOL` batches (the last one up to twice as large), each
    sorted by length, and the batches of a pool are shuffled again. What is left over is then a run of like lengths at a
    random place of the last pool, and what fills it up comes nearest to it in length.

    Raises:
        ValueError: fewer examples than one batch.
    """
    if len(lengths) < batch_size:
        raise ValueError(f"train.batch_size: {batch_size} exceeds the {len(lengths)} examples to train on: lower it")
    rng = np.random.default_rng(seed)
    out: list[np.ndarray] = []
    left = np.empty(0, dtype=np.int64)
    while len(out) < steps:
        order = rng.permutation(len(lengths))
        if len(left):
            others = order[~np.isin(order, left)][: batch_size * POOL]
            if by_length:
                others = others[np.argsort(np.abs(lengths[others] - np.median(lengths[left])), kind="stable")]
            out.append(np.concatenate([left, others[: batch_size - len(left)]]))
            order = order[~np.isin(order, out[-1][len(left) :])]
        pools = max(1, len(order) // (batch_size * POOL))
        for pool in np.split(order, batch_size * POOL * np.arange(1, pools)):
            if by_length:
                pool = pool[np.argsort(lengths[pool], kind="stable")]
            count, over = divmod(len(pool), batch_size)
            first = batch_size * int(rng.integers(count + 1)) if over else len(pool)
            left, pool = pool[first : first + over], np.delete(pool, slice(first, first + over))
            out.extend(pool.reshape(count, batch_size)[rng.permutation(count)])
    return out[:steps]


def labelled(encoding: Encoding, example: SupportsIndex, loss_on: LossOn) -> Bool[np.ndarray, "time"]:
    """Tokens of an example that carry a label: all, or of `completion` those of every turn's reasoning and answer."""
    return np.ones(encoding.lengths[example], dtype=bool) if loss_on == "all" else encoding.completion(example)


def collate(encoding: Encoding, examples: Int64[np.ndarray, "batch"], pad_id: int, loss_on: LossOn = "all") -> Batch:
    """Pad the examples on the right. With `loss_on: completion` the tokens of prompts have no label."""
    longest = int(encoding.lengths[examples].max())
    ids = np.full((len(examples), longest), pad_id, dtype=np.int64)
    labels = np.full((len(examples), longest), IGNORE, dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=np.int64)
    for row, example in enumerate(examples):
        tokens = encoding.ids[encoding.rows(example)]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = np.where(labelled(encoding, example, loss_on), tokens, IGNORE)
    return Batch(np.asarray(examples), torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels))


def spread(count: int, wanted: int) -> Int64[np.ndarray, "example"]:
    """`wanted` numbers spread evenly over 0 … count − 1, so that every task is among them."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))

"""Batches: which examples go into which optimizer step, and how they are padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from kvpipe.encoding import Encoding

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

    def to(self, device) -> Batch:
        """The tensors on another device."""
        return Batch(self.examples, self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def schedule(
    lengths: Int64[np.ndarray, "example"], batch_size: int, steps: int, seed: int, by_length: bool
) -> list[Int64[np.ndarray, "batch"]]:
    """The examples of every optimizer step: epochs of a seeded shuffle, cut into full batches.

    With `by_length`, the shuffle is cut into pools of `POOL` batches, each sorted by length, and the batches of a pool
    are shuffled again; every example still occurs once per epoch (but for a last incomplete batch).

    Raises:
        ValueError: fewer examples than one batch.
    """
    if len(lengths) < batch_size:
        raise ValueError(f"train.batch_size {batch_size} exceeds the {len(lengths)} training examples")
    rng = np.random.default_rng(seed)
    out: list[np.ndarray] = []
    while len(out) < steps:
        order = rng.permutation(len(lengths))
        epoch: list[np.ndarray] = []
        for start in range(0, len(order), batch_size * POOL):
            pool = order[start : start + batch_size * POOL]
            if by_length:
                pool = pool[np.argsort(lengths[pool], kind="stable")]
            batches = [pool[i : i + batch_size] for i in range(0, len(pool) - batch_size + 1, batch_size)]
            epoch.extend(batches[i] for i in rng.permutation(len(batches)))
        out.extend(epoch)
    return out[:steps]


def collate(encoding: Encoding, examples: Int64[np.ndarray, "batch"], pad_id: int, prompt_loss: bool = True) -> Batch:
    """Pad the examples on the right. Without `prompt_loss` the labels of the prompt are ignored."""
    longest = int(encoding.lengths[examples].max())
    ids = np.full((len(examples), longest), pad_id, dtype=np.int64)
    labels = np.full((len(examples), longest), IGNORE, dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=np.int64)
    for row, example in enumerate(examples):
        tokens = encoding.ids[encoding.rows(example)]
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        first = 0 if prompt_loss else int(encoding.segments[example, 0, 1])
        labels[row, first : len(tokens)] = tokens[first:]
    return Batch(np.asarray(examples), torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels))

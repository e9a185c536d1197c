"""Negative log-likelihood per example: the one measure behind validation curves and test scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64

from kvpipe.batches import IGNORE, Batch, collate
from kvpipe.encoding import Encoding
from kvpipe.losses import token_nll


@dataclass(frozen=True)
class Scores:
    """Per example: nats, tokens and bytes of reasoning + answer, and of all text. The end-of-text token is not counted."""

    nll: Float64[np.ndarray, "example"]
    tokens: Int64[np.ndarray, "example"]
    bytes: Int64[np.ndarray, "example"]
    nll_all: Float64[np.ndarray, "example"]
    tokens_all: Int64[np.ndarray, "example"]
    bytes_all: Int64[np.ndarray, "example"]

    def mean_nll(self) -> float:
        """Nats per token of reasoning + answer over all examples."""
        return float(self.nll.sum() / self.tokens.sum())


def scoring_batches(encoding: Encoding, pad_id: int, batch_size: int) -> list[Batch]:
    """Every example once, sorted by length, with labels on tokens that have bytes."""
    order = np.argsort(encoding.lengths, kind="stable")
    batches = []
    for start in range(0, len(order), batch_size):
        batch = collate(encoding, order[start : start + batch_size], pad_id)
        for row, example in enumerate(batch.examples):
            empty = np.diff(encoding.spans[encoding.rows(example)], axis=1)[:, 0] == 0
            batch.labels[row, : len(empty)][torch.from_numpy(empty)] = IGNORE
        batches.append(batch)
    return batches


@torch.no_grad()
def score(model, encoding: Encoding, batches: list[Batch]) -> Scores:
    """Score every example of `scoring_batches(encoding, …)`; the model's mode is put back as it was."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    count = len(encoding)
    nll, nll_all = np.zeros(count), np.zeros(count)
    tokens, tokens_all = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for batch in batches:
        moved = batch.to(device)
        logits = model(input_ids=moved.input_ids, attention_mask=moved.attention_mask, use_cache=False).logits
        losses = token_nll(logits, moved.labels).double().cpu()
        counted = batch.labels != IGNORE
        counted[:, 0] = False  # nothing predicts the first token
        starts = torch.from_numpy(encoding.segments[batch.examples, 0, 1])
        completion = counted & (torch.arange(losses.shape[1])[None] >= starts[:, None])
        for out, mask in ((nll, completion), (nll_all, counted)):
            out[batch.examples] = (losses * mask).sum(1).numpy()
        for out_count, mask in ((tokens, completion), (tokens_all, counted)):
            out_count[batch.examples] = mask.sum(1).numpy()
    model.train(training)
    ends = encoding.byte_segments[:, -1, 1]
    # bytes that the first token spells are not predicted and not counted
    first = np.array([encoding.spans[encoding.rows(e)][0, 1] for e in range(count)])
    return Scores(nll, tokens, ends - encoding.byte_segments[:, 0, 1], nll_all, tokens_all, ends - first)

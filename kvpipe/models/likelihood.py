"""Negative log-likelihood per example: the one measure behind validation curves and test scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int64, Integer
from torch import Tensor
from torch.nn import functional as F

from kvpipe.align.regime import by_own_length, of_length
from kvpipe.data.batches import IGNORE, Batch, collate
from kvpipe.data.encoding import SEGMENTS, Encoding
from kvpipe.experiment.progress import track
from kvpipe.experiment.sizes import SCORED
from kvpipe.models.head import Head, final_states

CHUNK = 1024
"""Tokens of a window that are read at once."""


def wide(values: Tensor) -> Tensor:
    """In float32, or in float64 where it is: what losses, weights and sums are computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def token_nll(
    logits: Float[Tensor, "batch time vocab"], labels: Integer[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """−log p of each token in nats, at the token's own position: entry t scores ``labels[:, t]`` by ``logits[:,
    t-1]``.

    The first position, which nothing predicts, and labels of −100 are 0.
    """
    scores = rearrange(wide(logits[:, :-1]), "batch time vocab -> (batch time) vocab")
    nll = F.cross_entropy(scores, labels[:, 1:].flatten().long(), ignore_index=IGNORE, reduction="none")
    return F.pad(rearrange(nll, "(batch time) -> batch time", batch=len(labels)), (1, 0))


@torch.no_grad()
def nll_of_states(
    head: Head, states: Float[Tensor, "row width"], targets: Integer[Tensor, "row"]
) -> Float[Tensor, "row"]:
    """−log p of each target in nats, from the final state that predicts it; of the logits a piece is held at a time."""
    head = head.cast(states.dtype)
    nll = torch.zeros(len(states), dtype=wide(states[:0]).dtype, device=states.device)
    for piece in head.pieces(states):
        nll[piece] = F.cross_entropy(wide(head.logits(states[piece])), targets[piece].long(), reduction="none")
    return nll


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


def groups(
    lengths: Int64[np.ndarray, "example"], size: int, tokens: int, longest_first: bool = False
) -> list[Int64[np.ndarray, "batch"]]:
    """Numbers of all examples, sorted by length, in groups of at most `size` and of at most `tokens` with their padding.

    An example of more tokens than that is a group of its own.
    """
    order = np.argsort(lengths, kind="stable")
    out: list[list[int]] = []
    for example in order[::-1] if longest_first else order:
        longest = max(int(lengths[example]), int(lengths[out[-1][0]])) if out else 0
        if not out or len(out[-1]) == size or (len(out[-1]) + 1) * longest > tokens:
            out.append([])
        out[-1].append(int(example))
    return [np.array(group, dtype=np.int64) for group in out]


def scoring_batches(
    encoding: Encoding, pad_id: int, batch_size: int, examples: Int64[np.ndarray, "example"] | None = None
) -> list[Batch]:
    """Every example (or those given) once, sorted by length, with labels on tokens that have bytes.

    A batch has at most `batch_size` examples, and fewer where they would be more than `SCORED` tokens.
    """
    chosen = np.arange(len(encoding)) if examples is None else np.unique(examples)
    batches = []
    for group in groups(encoding.lengths[chosen], batch_size, SCORED):
        batch = collate(encoding, chosen[group], pad_id)
        for row, example in enumerate(batch.examples):
            empty = np.diff(encoding.spans[encoding.rows(example)], axis=1)[:, 0] == 0
            batch.labels[row, : len(empty)][torch.from_numpy(empty)] = IGNORE
        batches.append(batch)
    return batches


@torch.no_grad()
def score(model, encoding: Encoding, batches: list[Batch]) -> Scores:
    """Score every example of `scoring_batches(encoding, …)`; the model's mode is put back as it was."""
    device = next(model.parameters()).device
    training = by_own_length(model).training
    model.eval()
    scores, head = empty_scores(encoding), Head.of(model)
    for batch in track(batches, "scoring", "examples", lambda batch: len(batch.examples)):
        moved = batch.to(device)
        inputs = {"input_ids": moved.input_ids, "attention_mask": moved.attention_mask, "use_cache": False}
        states, _ = final_states(model, head, **inputs)
        scored = moved.labels[:, 1:] != IGNORE
        losses = torch.zeros(batch.labels.shape, dtype=torch.float64)
        nll = nll_of_states(head, states[:, :-1][scored], moved.labels[:, 1:][scored])
        losses[:, 1:][scored.cpu()] = nll.double().cpu()
        counted = batch.predicted
        completion = counted.clone()
        for row, example in enumerate(batch.examples):
            inside = torch.from_numpy(encoding.completion(example))
            completion[row, : len(inside)] &= inside
        for out, mask in ((scores.nll, completion), (scores.nll_all, counted)):
            out[batch.examples] = (losses * mask).sum(1).numpy()
        for out_count, mask in ((scores.tokens, completion), (scores.tokens_all, counted)):
            out_count[batch.examples] = mask.sum(1).numpy()
    model.train(training)
    return scores


def empty_scores(encoding: Encoding) -> Scores:
    """Scores with the bytes of every example, and nothing predicted yet."""
    count = len(encoding)
    ends = encoding.byte_segments[:, -1, 1]
    # bytes that the first token spells are not predicted and not counted
    first = np.array([encoding.spans[encoding.rows(e)][0, 1] for e in range(count)], dtype=np.int64)
    starts = np.maximum(encoding.byte_segments[:, 0, 1], first)
    asked = np.diff(encoding.byte_segments[:, SEGMENTS::SEGMENTS], axis=2).sum((1, 2))  # later turns' prompts
    floats, integers = np.zeros((2, count)), np.zeros((2, count), np.int64)
    return Scores(floats[0], integers[0], ends - starts - asked, floats[1], integers[1], ends - first)


@torch.no_grad()
def windowed_nll(
    model, ids: Int64[np.ndarray, "time"], window: int, stride: int, chunk: int = CHUNK
) -> Float64[np.ndarray, "time"]:
    """Nats of every token of a text longer than the model reads; 0 for the first, which nothing predicts.

    Window k reads the tokens from k · stride to k · stride + window. A token is predicted in the first window that reads
    all before it from the window's start: every token once, from at least min(its position, window − stride + 1) tokens.
    A window is read in chunks on a KV cache, and of logits a piece is all that is held.

    Raises:
        ValueError: no 1 ≤ stride ≤ window.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"a stride of {stride} needs a window of at least as much, got {window}")
    device, head = next(model.parameters()).device, Head.of(model)
    tokens = torch.from_numpy(ids).to(device)
    out = np.zeros(len(ids))
    scored = 0  # the last token that has been predicted
    for start in range(0, len(ids), stride):
        stop, cache = min(start + window, len(ids) - 1), None
        with of_length(model, max(stop - start, 1)):
            for first in range(start, stop, chunk):
                last = min(first + chunk, stop)
                inputs = {"input_ids": tokens[None, first:last], "past_key_values": cache, "use_cache": True}
                states, result = final_states(model, head, **inputs)
                cache = result.past_key_values
                new = max(first, scored)
                if new < last:
                    nll = nll_of_states(head, states[0, new - first :], tokens[new + 1 : last + 1])
                    out[new + 1 : last + 1] = nll.double().cpu().numpy()
        scored = stop
        if stop == len(ids) - 1:
            break
    return out


def score_long(model, encoding: Encoding, scores: Scores, example: int, window: int, stride: int) -> None:
    """Enter the scores of one long example, read in windows; its place in `scores` is empty before."""
    rows = encoding.rows(example)
    nll = windowed_nll(model, encoding.ids[rows], window, stride)
    counted = encoding.spans[rows, 1] > encoding.spans[rows, 0]
    counted[0] = False
    completion = counted & encoding.completion(example)
    scores.nll[example], scores.nll_all[example] = nll[completion].sum(), nll[counted].sum()
    scores.tokens[example], scores.tokens_all[example] = completion.sum(), counted.sum()

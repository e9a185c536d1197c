"""A teacher's forward over texts: keys and values of some layers, nats, likeliest next tokens, final states; batch by batch.

Texts of like length are read together, as many tokens at a time as fit into `ROOM`; of logits a piece is made where
something of them is kept, and none where nothing is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn.functional import pad

from kvpipe.cache.capture import Recorder, kv_geometry
from kvpipe.data.batches import Batch, collate
from kvpipe.data.encoding import Encoding, concatenated_ranges
from kvpipe.experiment.sizes import MOST, ROOM, batch_numbers, shape
from kvpipe.models.head import Head, final_states
from kvpipe.models.likelihood import groups, wide


@dataclass(frozen=True)
class Keep:
    """What is kept of a forward."""

    layers: tuple[int, ...] = ()
    nll: bool = False
    top: int = 0
    states: bool = False
    hidden: tuple[int, ...] = ()
    """Layers whose input is kept."""


@dataclass(frozen=True)
class TeacherRows:
    """What one teacher says about the tokens of some examples, row by row; None what was not asked for."""

    keys: Float[Tensor, "row layer head dim"]
    values: Float[Tensor, "row layer head dim"]
    nll: Float[Tensor, "row"] | None = None
    """−log p of the token itself, nats; 0 for the first of an example."""
    top_ids: Int[Tensor, "row top"] | None = None
    """Most likely *next* tokens."""
    top_logprobs: Float[Tensor, "row top"] | None = None
    states: Float[Tensor, "row width"] | None = None
    """Final states: what the head makes the next token's logits of."""
    hidden: Float[Tensor, "row hidden_layer width"] | None = None
    """What enters some layers."""

    def named(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


def batch_tokens(model, head: Head, layers: int) -> int:
    """Tokens that a batch may have: in a layer the widest activations, the kept layers' caches twice, and of a family
    whose head is unknown its logits."""
    kind = "cpu" if next(model.parameters()).device.type == "cpu" else "cuda"
    found = shape(model.config.to_dict())
    if found is None:
        return MOST[kind]
    width = 2 if model.dtype in (torch.bfloat16, torch.float16) else 4
    logits = found.vocab * (width + 8) if head.weight is None else 0
    return max(1, min(MOST[kind], int(ROOM[kind] / (width * batch_numbers(found, layers) + logits))))


def forward_batches(
    model, encoding: Encoding, examples: Int64[np.ndarray, "example"], keep: Keep, batch_size: int, pad_id: int
) -> Iterator[tuple[Int64[np.ndarray, "member"], TeacherRows]]:
    """Batches, the longest texts first: places in `examples`, and their rows one after the other, in the model's dtype."""
    device, head = next(model.parameters()).device, Head.of(model)
    lengths = encoding.lengths[examples]
    tokens = batch_tokens(model, head, len(keep.layers))
    with Recorder(model, hidden=bool(keep.hidden), layers=keep.layers) as recorder:
        for members in groups(lengths, batch_size, tokens, longest_first=True):
            batch = collate(encoding, examples[members], pad_id).to(device)
            yield members, _forward(model, head, recorder, batch, lengths[members], keep)


# not on the generator, whose consumer would run under it
@torch.no_grad()
def _forward(
    model, head: Head, recorder: Recorder, batch: Batch, lengths: Int64[np.ndarray, "member"], keep: Keep
) -> TeacherRows:
    """One forward: what is kept of it, on the CPU."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    states, _ = final_states(model, head, **inputs)
    _, heads, dim = kv_geometry(model.config)
    none = states.new_empty(int(lengths.sum()), 0, heads, dim)
    keys, values = recorder.rows(batch.mask) if keep.layers else (none, none)
    states = states[batch.mask]
    found: dict[str, Tensor] = {}
    if keep.nll or keep.top:
        first = torch.from_numpy(np.cumsum(lengths) - lengths)
        nll, ids, logprobs = next_tokens(head, states, batch.input_ids[batch.mask], first, keep.top)
        found |= {"nll": nll} if keep.nll else {}
        found |= {"top_ids": ids.int(), "top_logprobs": logprobs.half()} if keep.top else {}
    if keep.states:
        found["states"] = states
    if keep.hidden:
        found["hidden"] = rearrange(
            recorder.hidden_states()[list(keep.hidden)], "layer batch time width -> batch time layer width"
        )[batch.mask]
    return TeacherRows(keys.cpu(), values.cpu(), **{name: x.cpu() for name, x in found.items()})


def forward_rows(
    model, encoding: Encoding, examples: Int64[np.ndarray, "example"], keep: Keep, batch_size: int, pad_id: int
) -> TeacherRows:
    """What is kept of the rows of some examples, in their order; caches, hidden and final states in float32."""
    starts = np.concatenate([[0], np.cumsum(encoding.lengths[examples])])
    out: dict[str, Tensor] = {}
    for members, found in forward_batches(model, encoding, examples, keep, batch_size, pad_id):
        rows = torch.from_numpy(concatenated_ranges(starts[members], starts[members + 1]))
        for name, tensor in found.named().items():
            kind = torch.float32 if name in ("keys", "values", "hidden", "states") else tensor.dtype
            out.setdefault(name, torch.empty(int(starts[-1]), *tensor.shape[1:], dtype=kind))[rows] = tensor.to(kind)
    return TeacherRows(**out)


def next_tokens(
    head: Head,
    states: Float[Tensor, "row width"],
    ids: Int64[Tensor, "row"],
    first: Int64[Tensor, "text"],
    top: int,
) -> tuple[Float[Tensor, "row"], Int64[Tensor, "row top"], Float[Tensor, "row top"]]:
    """Nats of every token, and the `top` most likely next ones: ids and log-probabilities.

    Rows are those of texts one after the other; `first` are the rows at which they begin, which nothing predicts.
    """
    head, rows = head.cast(states.dtype), len(states)
    nll = torch.zeros(rows + 1, device=states.device)
    best = ids.new_empty(rows, top), nll.new_empty(rows, top)
    following = torch.cat([ids[1:], ids[:1]])
    for piece in head.pieces(states):
        logits = wide(head.logits(states[piece]))
        if top:
            values, best[0][piece] = likeliest(logits, top)
            total = logits.sub(values[:, :1]).exp_().sum(-1, keepdim=True).log_().add_(values[:, :1])
            best[1][piece] = values - total
        else:
            total = logits.logsumexp(-1, keepdim=True)
        # a token is scored by the row before it
        nll[piece.start + 1 : piece.stop + 1] = (total - logits.gather(-1, following[piece, None]))[:, 0]
    nll[first.to(nll.device)] = 0
    return nll[:-1], *best


GROUP = 64
"""Words that are looked at together for the likeliest ones."""


def likeliest(
    logits: Float[Tensor, "row vocab"], top: int
) -> tuple[Float[Tensor, "row top"], Int64[Tensor, "row top"]]:
    """`logits.topk(top)` in half the time: the largest lie in the groups of words whose own largest are the largest.

    Of equal logits either may come first, as in `topk`.
    """
    if logits.shape[1] <= 4 * top * GROUP:
        values, ids = logits.topk(top)
        return values, ids
    groups = rearrange(
        pad(logits, (0, -logits.shape[1] % GROUP), value=-torch.inf), "row (group word) -> row group word", word=GROUP
    )
    chosen = groups.amax(-1).topk(top).indices
    values, place = groups.gather(1, chosen[..., None].expand(-1, -1, GROUP)).flatten(1).topk(top)
    return values, chosen.gather(1, place // GROUP) * GROUP + place % GROUP

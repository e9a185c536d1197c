"""What a cache is for: the attention outputs that a model's own queries read from it (spec 4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from kvpipe.align.rope import Rope
from kvpipe.cache.kv import KV
from kvpipe.models.likelihood import wide


def attention_outputs(
    queries: Float[Tensor, "layer batch query_head time dim"],
    kv: KV,
    ropes: list[Rope],
    positions: Int64[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "layer batch query_head time dim"]:
    """Causal attention of every layer; queries and keys before rotation, one `Rope` per layer.

    `positions` are 0, 1, 2, … by default; of padded texts those of `positions_from_mask`, which tell their lengths.
    Logits are scaled by 1/√dim. Right padding changes no output before it.
    """
    group, out = queries.shape[2] // kv.keys.shape[2], []
    for layer, (q, k) in enumerate(_rotated(queries, kv.keys, ropes, positions)):
        v = repeat(kv.values[layer], "batch head time dim -> batch (head group) time dim", group=group)
        out.append(scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.stack(out)


def attention_logs(
    queries: Float[Tensor, "layer batch query_head time dim"],
    keys: Float[Tensor, "layer batch head time dim"],
    ropes: list[Rope],
    positions: Int64[Tensor, "batch time"] | None = None,
) -> Iterator[Float[Tensor, "batch query_head time key"]]:
    """Logarithms of the causal attention weights, in float32, layer by layer: a layer's are quadratic in the length."""
    for q, k in _rotated(queries, keys, ropes, positions):
        scores = wide(q) @ wide(k).mT * q.shape[-1] ** -0.5
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        yield scores.masked_fill(later, -torch.inf).log_softmax(-1)


def _rotated(queries: Tensor, keys: Tensor, ropes: list[Rope], positions: Tensor | None) -> Iterator[list[Tensor]]:
    """Queries and keys of every layer as attention multiplies them, keys repeated for each query head."""
    group = queries.shape[2] // keys.shape[2]
    if positions is None:
        positions = torch.arange(queries.shape[3], device=queries.device)
    for layer, rope in enumerate(ropes):
        k = rope.rotate(keys[layer], positions)
        k = repeat(k, "batch head time dim -> batch (head group) time dim", group=group)
        yield [rope.rotate(queries[layer], positions), k]


def output_cosine(
    queries: Float[Tensor, "layer batch query_head time dim"],
    own: KV,
    other: KV,
    ropes: list[Rope],
    mask: Bool[Tensor, "batch time"],
    positions: Int64[Tensor, "batch time"] | None = None,
) -> list[float]:
    """Per layer the mean cosine of attention outputs from a model's own cache and from another in its place.

    Positions outside `mask` keep the model's own entry and are not counted.
    """
    inside = mask[None, :, None, :, None]
    mixed = KV(torch.where(inside, other.keys, own.keys), torch.where(inside, other.values, own.values))
    exact, replaced = (attention_outputs(queries, kv, ropes, positions) for kv in (own, mixed))
    cosine = cosine_similarity(exact, replaced, dim=-1).mean(2)
    return [layer[mask].mean().item() for layer in cosine]

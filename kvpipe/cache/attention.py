"""What a cache is for: the attention outputs that a model's own queries read from it (spec 4)."""

from __future__ import annotations

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from kvpipe.align.rope import Rope
from kvpipe.cache.kv import KV


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
    group = queries.shape[2] // kv.keys.shape[2]
    if positions is None:
        positions = torch.arange(queries.shape[3], device=queries.device)
    out = []
    for layer, rope in enumerate(ropes):
        q, k = rope.rotate(queries[layer], positions), rope.rotate(kv.keys[layer], positions)
        k, v = (
            repeat(x, "batch head time dim -> batch (head group) time dim", group=group) for x in (k, kv.values[layer])
        )
        out.append(scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.stack(out)


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

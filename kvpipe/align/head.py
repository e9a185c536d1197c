"""The head step: teacher KV heads mixed into the student's number of heads (spec 3.4)."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn


def grouped_average(src_heads: int, dst_heads: int) -> Float[Tensor, "dst_heads src_heads"]:
    """Row-stochastic weights by interval overlap: head ``i`` of ``n`` covers ``[i/n, (i+1)/n)``.

    For 12 → 2 the plain mean of six heads each, for 2 → 8 each head repeated four times, for 7 → 3 the head on a
    border shared in proportion.
    """
    if src_heads < 1 or dst_heads < 1:
        raise ValueError(f"both models need a KV head; got {src_heads} source and {dst_heads} destination heads")
    # In units of 1 / (src_heads · dst_heads) all edges are integers, so the overlaps are exact.
    src, dst = torch.arange(src_heads) * dst_heads, torch.arange(dst_heads)[:, None] * src_heads
    overlap = torch.minimum(src + dst_heads, dst + src_heads) - torch.maximum(src, dst)
    return overlap.clamp(min=0) / src_heads


class HeadMixer(nn.Module):
    """A learnable mix of heads, ``(…, src_heads, time, dim) → (…, dst_heads, time, dim)``.

    It begins as the grouped average.
    """

    def __init__(self, src_heads: int, dst_heads: int):
        super().__init__()
        self.weight = nn.Parameter(grouped_average(src_heads, dst_heads))

    def forward(self, x: Float[Tensor, "*lead src_heads time dim"]) -> Float[Tensor, "*lead dst_heads time dim"]:
        """Mixes the head axis; raises `ValueError` when it is not `src_heads` long."""
        dst_heads, src_heads = self.weight.shape
        if x.shape[-3] != src_heads:
            raise ValueError(
                f"HeadMixer({src_heads}, {dst_heads}) got {tuple(x.shape)}: axis -3 (head) must be {src_heads} KV heads"
            )
        return einsum(self.weight.to(x.dtype), x, "dst src, ... src time dim -> ... dst time dim")

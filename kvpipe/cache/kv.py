"""The axis alphabet, the `KV` container and the precision of sums.

Axes, in this order wherever they occur together: ``layer batch head time dim``. Teacher axes are
``src_*``, student axes ``dst_*``. ``head`` counts KV heads (`num_key_value_heads`), ``dim`` is the real
head dimension. Keys are always *before* rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class KV:
    """Keys (before rotary embedding) and values of every layer of one model on one batch."""

    keys: Float[Tensor, "layer batch head time dim"]
    values: Float[Tensor, "layer batch head time value_dim"]

    def to(self, *args, **kwargs) -> KV:
        """Both tensors through `torch.Tensor.to`."""
        return KV(self.keys.to(*args, **kwargs), self.values.to(*args, **kwargs))

    def detach(self) -> KV:
        """Both tensors cut from the graph."""
        return KV(self.keys.detach(), self.values.detach())


def wide(values: Tensor) -> Tensor:
    """In float32, or in float64 where it is: what losses, weights and sums are computed in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))

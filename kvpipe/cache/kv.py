"""The axis alphabet, the `KV` container and the precision of sums.

Axes, in this order wherever they occur together: ``layer batch head time dim``. Teacher axes are
``src_*``, student axes ``dst_*``. ``head`` counts KV heads (`num_key_value_heads`), ``dim`` is the real
head dimension. Keys are always *before* rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

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

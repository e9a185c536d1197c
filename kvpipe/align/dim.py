"""The dimension step: the elastic bottleneck from the teacher's to the student's width (spec 3.4)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def default_mlp_ratio(n_params: float | int) -> float:
    """Hidden width over input width by the teacher's number of parameters: < 7e9 0.5, < 30e9 1.0, from 30e9 2.0."""
    if n_params <= 0:
        raise ValueError(f"n_params is the teacher's number of parameters (7e9 for 7B); got {n_params}")
    if n_params < 7e9:
        return 0.5
    return 1.0 if n_params < 30e9 else 2.0


class ElasticBottleneck(nn.Module):
    """LayerNorm → Linear(src_dim → hidden) → SiLU → Dropout → Linear(hidden → dst_dim), on the last axis.

    ``hidden = mlp_ratio · src_dim``, rounded, at least 1. Without `mlp_ratio` it is `default_mlp_ratio` of
    `src_params`, the teacher's number of parameters, and 1.0 when that is not given either.

    Beside the bottleneck lies a linear skip path. It is zero and does not train until `warm_start` loads a fitted
    linear map into it; a module that was never warm-started is exactly the bottleneck above.
    """

    def __init__(
        self,
        src_dim: int,
        dst_dim: int,
        mlp_ratio: float | int | None = None,
        src_params: float | int | None = None,
        dropout: float | int = 0.0,
    ):
        super().__init__()
        if mlp_ratio is None:
            mlp_ratio = 1.0 if src_params is None else default_mlp_ratio(src_params)
        if mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be positive; got {mlp_ratio}")
        self.mlp_ratio = mlp_ratio
        self.hidden_dim = max(1, round(mlp_ratio * src_dim))
        self.norm = nn.LayerNorm(src_dim)
        self.inner = nn.Linear(src_dim, self.hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(self.hidden_dim, dst_dim)
        self.skip = nn.Linear(src_dim, dst_dim).requires_grad_(False)
        nn.init.zeros_(self.skip.weight)
        nn.init.zeros_(self.skip.bias)

    def forward(self, x: Float[Tensor, "*lead src_dim"]) -> Float[Tensor, "*lead dst_dim"]:
        """Maps the last axis; raises `ValueError` when it is not `src_dim` long."""
        if x.shape[-1] != self.inner.in_features:
            raise ValueError(
                f"ElasticBottleneck({self.inner.in_features}, {self.outer.out_features}) got {tuple(x.shape)}: "
                f"the last axis (dim) must be {self.inner.in_features}"
            )
        hidden = nn.functional.silu(self.inner(self.norm(x)))
        return self.skip(x) + self.outer(self.dropout(hidden))

    @torch.no_grad()
    def warm_start(
        self, weight: Float[Tensor, "dst_dim src_dim"], bias: Float[Tensor, " dst_dim"] | None = None
    ) -> ElasticBottleneck:
        """Makes the module equal ``x ↦ weight · x + bias`` exactly: the map goes into the skip path, which trains
        from here on, and the last Linear of the bottleneck is zeroed. Returns the module itself.
        """
        if weight.shape != self.skip.weight.shape:
            raise ValueError(
                f"warm start needs a weight (dst_dim, src_dim) {tuple(self.skip.weight.shape)}; "
                f"got {tuple(weight.shape)}"
            )
        self.skip.weight.copy_(weight)
        self.skip.bias.zero_() if bias is None else self.skip.bias.copy_(bias)
        self.skip.requires_grad_(True)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        return self

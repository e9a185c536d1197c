"""Projectors: one teacher's aligned cache → the student's layers, heads and head dimension."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from kvpipe.align.dim import ElasticBottleneck
from kvpipe.align.head import HeadMixer, grouped_average
from kvpipe.align.layermap import KINDS, LayerPlan
from kvpipe.cache.kv import KV
from kvpipe.config import PROJECTORS, ProjectorSettings
from kvpipe.config.projection import ElasticProjectorConfig, HeadsProjectorConfig, LinearProjectorConfig
from kvpipe.experiment.files import content_digest, read_json, save_tensors, verify, write_json


class Geometry(NamedTuple):
    """Heads and head dimension on both sides, and the number of student layers."""

    src_heads: int
    src_dim: int
    dst_heads: int
    dst_dim: int
    dst_layers: int


Rows = Float[Tensor, "batch time src_layer head dim"]


def select(x: Rows, plan: LayerPlan, kind: int) -> Float[Tensor, "dst_layer batch time k head dim"]:
    """The plan's layers side by side (weighted by √β) or added (k = 1)."""
    picked = rearrange(x[:, :, plan.index[kind]], "batch time layer k head dim -> layer batch time k head dim")
    beta = rearrange(plan.beta[kind].to(x), "layer k -> layer 1 1 k 1 1")
    if plan.concat:
        return picked * beta.sqrt()
    if plan.k == 1:
        return picked
    return (picked * beta).sum(3, keepdim=True)


@PROJECTORS.built_from(LinearProjectorConfig)
class LinearProjector(nn.Module):
    """One affine map per student layer over the flattened k·head·dim, for keys and for values."""

    def __init__(self, geometry: Geometry, plan: LayerPlan):
        super().__init__()
        self.geometry, self.plan = geometry, plan
        features = (plan.k if plan.concat else 1) * geometry.src_heads * geometry.src_dim
        width = geometry.dst_heads * geometry.dst_dim
        self.weight = nn.Parameter(torch.zeros(2, geometry.dst_layers, features, width))
        self.bias = nn.Parameter(torch.zeros(2, geometry.dst_layers, width))

    @classmethod
    def of(cls, settings: ProjectorSettings, geometry: Geometry, plan: LayerPlan, src_params: int) -> nn.Module:
        """From its settings."""
        return cls(geometry, plan)

    def forward(self, keys: Rows, values: Rows) -> KV:
        """Both projected: (dst_layer, batch, dst_head, time, dst_dim)."""
        return KV(self._one(keys, 0), self._one(values, 1))

    def _one(self, x: Rows, kind: int) -> Tensor:
        flat = rearrange(select(x, self.plan, kind), "layer batch time k head dim -> layer (batch time) (k head dim)")
        out = torch.baddbmm(self.bias[kind][:, None], flat, self.weight[kind])
        return rearrange(
            out,
            "layer (batch time) (head dim) -> layer batch head time dim",
            batch=len(x),
            head=self.geometry.dst_heads,
        )

    @torch.no_grad()
    def set_linear(self, kind: int, layer: int, weight: Float[Tensor, "feature out"], bias: Float[Tensor, "out"]):
        """Install a fitted map."""
        self.weight[kind, layer], self.bias[kind, layer] = weight, bias


@PROJECTORS.built_from(ElasticProjectorConfig)
class ElasticProjector(nn.Module):
    """An `ElasticBottleneck` per student layer, for keys and for values; starts from a linear map."""

    def __init__(self, geometry: Geometry, plan: LayerPlan, config: ElasticProjectorConfig, src_params: int):
        super().__init__()
        self.geometry, self.plan = geometry, plan
        features = (plan.k if plan.concat else 1) * geometry.src_heads * geometry.src_dim
        width = geometry.dst_heads * geometry.dst_dim
        self.maps = nn.ModuleList(
            nn.ModuleList(
                ElasticBottleneck(features, width, config.mlp_ratio, src_params, config.dropout)
                for _ in range(geometry.dst_layers)
            )
            for _ in KINDS
        )
        for module in self.encoders():
            module.warm_start(torch.zeros(width, features), torch.zeros(width))

    def encoders(self) -> list[ElasticBottleneck]:
        """All bottlenecks, keys first."""
        return [m for kind in self.maps for m in kind]  # type: ignore[union-attr,attr-defined]

    @classmethod
    def of(cls, settings: ElasticProjectorConfig, geometry: Geometry, plan: LayerPlan, src_params: int) -> nn.Module:
        """From its settings."""
        return cls(geometry, plan, settings, src_params)

    def forward(self, keys: Rows, values: Rows) -> KV:
        """Both projected: (dst_layer, batch, dst_head, time, dst_dim)."""
        return KV(self._one(keys, 0), self._one(values, 1))

    def _one(self, x: Rows, kind: int) -> Tensor:
        flat = rearrange(select(x, self.plan, kind), "layer batch time k head dim -> layer batch time (k head dim)")
        out = torch.stack([m(f) for m, f in zip(self.maps[kind], flat, strict=True)])  # type: ignore[call-overload]
        return rearrange(out, "layer batch time (head dim) -> layer batch head time dim", head=self.geometry.dst_heads)

    @torch.no_grad()
    def set_linear(self, kind: int, layer: int, weight: Float[Tensor, "feature out"], bias: Float[Tensor, "out"]):
        """Start the bottleneck at a fitted linear map."""
        self.maps[kind][layer].warm_start(weight.T.contiguous(), bias)  # type: ignore[index,operator]


@PROJECTORS.built_from(HeadsProjectorConfig)
class HeadsProjector(nn.Module):
    """Two steps that keep heads apart: head dimension per head, then head mixing from the grouped average."""

    def __init__(self, geometry: Geometry, plan: LayerPlan):
        super().__init__()
        if plan.concat and plan.k > 1:
            raise ValueError("projector.kind: heads keeps heads apart: set layer.combine: mix")
        self.geometry, self.plan = geometry, plan
        start = grouped_average(geometry.src_dim, geometry.dst_dim).T
        self.dim_maps = nn.Parameter(start.expand(2, geometry.dst_layers, -1, -1).clone())
        self.mixers = nn.ModuleList(
            nn.ModuleList(HeadMixer(geometry.src_heads, geometry.dst_heads) for _ in range(geometry.dst_layers))
            for _ in KINDS
        )

    @classmethod
    def of(cls, settings: ProjectorSettings, geometry: Geometry, plan: LayerPlan, src_params: int) -> nn.Module:
        """From its settings."""
        return cls(geometry, plan)

    def forward(self, keys: Rows, values: Rows) -> KV:
        """Both projected: (dst_layer, batch, dst_head, time, dst_dim)."""
        return KV(self._one(keys, 0), self._one(values, 1))

    def _one(self, x: Rows, kind: int) -> Tensor:
        picked = select(x, self.plan, kind)[:, :, :, 0]
        narrowed = einsum(
            picked, self.dim_maps[kind], "layer batch time head dim, layer dim out -> layer batch head time out"
        )
        return torch.stack([m(h) for m, h in zip(self.mixers[kind], narrowed, strict=True)])  # type: ignore[call-overload]


Projector = Any
"""A module with `geometry` and `plan`: keys and values `Rows` → `KV`, and where it is fitted by a linear map `set_linear`."""


def build_projector(settings: ProjectorSettings, geometry: Geometry, plan: LayerPlan, src_params: int) -> Projector:
    """The projector of an arm for one teacher, unfitted.

    Args:
        settings: of its kind.
        geometry: heads and dimensions on both sides.
        plan: teacher layers of each student layer, counted as in the rows that `forward` gets.
        src_params: parameters of the teacher; the default width of `elastic` follows it.
    """
    return PROJECTORS.of(settings).of(settings, geometry, plan, src_params)


# ---------------------------------------------------------------- on disk
def save_projectors(path: Path, teachers: list[str], projectors: Sequence[Projector], document: dict[str, Any]) -> None:
    """Write all projectors of a fit to one file, with how they were fitted in its metadata and beside it as JSON."""
    tensors = _named(teachers, projectors)
    save_tensors({name: t.detach() for name, t in tensors.items()}, path, {"fit": json.dumps(document, sort_keys=True)})
    document = {**document, "sha256": content_digest(path)}
    write_json(path.with_suffix(".json"), document, sort_keys=True)


def load_projectors(path: Path, teachers: list[str], projectors: Sequence[Projector]) -> None:
    """Fill unfitted projectors from the file of their fit.

    Raises:
        FileNotFoundError: it was not made.
        ValueError: it is damaged, or holds other tensors.
    """
    document, run = path.with_suffix(".json"), f"run `kvpipe fit --fit {path.stem}`"
    for file in (path, document):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: {run} first")
    verify(path, read_json(document, run).get("sha256", ""), document, run)
    tensors, expected = load_file(path), _named(teachers, projectors)
    names = expected.keys() | tensors.keys()
    other = sorted(n for n in names if n not in expected or n not in tensors or expected[n].shape != tensors[n].shape)
    if other:
        raise ValueError(f"{path} does not fit the arm {teachers}: tensors {other[:3]}; {run}")
    for teacher, projector in zip(teachers, projectors, strict=True):
        prefix = f"{teacher}/"
        projector.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def _named(teachers: list[str], projectors: Sequence[Projector]) -> dict[str, Tensor]:
    both = zip(teachers, projectors, strict=True)
    return {
        f"{teacher}/{name}": tensor for teacher, projector in both for name, tensor in projector.state_dict().items()
    }

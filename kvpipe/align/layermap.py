"""Which teacher layers each student layer learns from: measured (CKA) or by depth, as one plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kvpipe.align.layer import proportional_map, top_k_mix
from kvpipe.config import LayerConfig
from kvpipe.experiment.files import read_json, write_json
from kvpipe.experiment.plan import digest

KINDS = ("keys", "values")
MEASURED = (*KINDS, "hidden")
"""What similarity is measured of."""


@dataclass(frozen=True)
class LayerPlan:
    """For keys and for values: the teacher layers of every student layer and their weights β (rows sum to 1).

    `index` counts in the teacher's own layers. `concat` sets layers side by side, scaled by √β, so that their squared
    norms are shared out as β; otherwise they are added with weights β.
    """

    index: Int64[Tensor, "kind dst_layer k"]
    beta: Float[Tensor, "kind dst_layer k"]
    concat: bool

    @property
    def k(self) -> int:
        """Teacher layers per student layer."""
        return self.index.shape[-1]

    @property
    def src_layers(self) -> list[int]:
        """All teacher layers that are used, sorted."""
        return sorted(set(self.index[self.beta > 0].tolist()))

    def within(self, stored: tuple[int, ...]) -> LayerPlan:
        """The same plan counting in the layers that a store keeps.

        Raises:
            ValueError: a layer is not stored.
        """
        missing = sorted(set(self.src_layers) - set(stored))
        if missing:
            raise ValueError(f"teacher layers {missing} are not in the store (has {list(stored)}); build it again")
        lookup = {layer: i for i, layer in enumerate(stored)}
        # a layer of weight 0 may be absent: any stored one stands in for it
        index = torch.tensor([lookup.get(i, 0) for i in self.index.flatten().tolist()]).reshape(self.index.shape)
        return LayerPlan(index, self.beta, self.concat)


def layer_plan(config: LayerConfig, src_layers: int, dst_layers: int, layer_map: Path | None) -> LayerPlan:
    """The plan of an arm for one teacher; under `cka` one with fewer than k layers gives all of them.

    Raises:
        FileNotFoundError: `cka` and the layer map has not been made.
        ValueError: an explicit list or the layer map does not fit the models.
    """
    if config.kind == "cka":
        if layer_map is None or not layer_map.is_file():
            name = layer_map.stem if layer_map is not None else "…"
            raise FileNotFoundError(f"layer map {layer_map} is missing: run `kvpipe layer-map --teacher {name}` first")
        similarity = _similarity(layer_map, src_layers, dst_layers)
        k = min(config.k, src_layers)
        measured = KINDS if config.by == "kv" else ("hidden", "hidden")
        compared = [_near(torch.tensor(similarity[kind]), config.near) for kind in measured]
        weights = torch.stack([top_k_mix(matrix, k, config.temperature) for matrix in compared])
        beta, index = weights.topk(k, dim=-1)
        return LayerPlan(index, beta, config.combine == "concat")
    chosen = proportional_map(src_layers, dst_layers) if config.kind == "proportional" else list(config.layers or [])
    if len(chosen) != dst_layers or not all(0 <= layer < src_layers for layer in chosen):
        raise ValueError(
            f"layer.layers {chosen}: expected {dst_layers} numbers between 0 and {src_layers - 1}, "
            "one teacher layer per student layer"
        )
    index = torch.tensor(chosen)[None, :, None].expand(2, -1, 1)
    return LayerPlan(index, torch.ones(2, dst_layers, 1), False)


def at_kept_depth(config: LayerConfig, src_layers: int, student: Mapping[str, Any]) -> LayerConfig:
    """`kept` as an explicit list: the teacher layers at the depth that the layers of a pruned student had.

    Args:
        config: of an arm; any other kind is given back as it is.
        src_layers: of the teacher.
        student: what the student's manifest says of its source.

    Raises:
        ValueError: the student is not pruned.
    """
    if config.kind != "kept":
        return config
    if student.get("source") != "pruned":
        raise ValueError("layer.kind: kept needs a student of source: pruned; take proportional, cka or list")
    scale = (src_layers - 1) / max(1, student["of_layers"] - 1)
    return config.model_copy(update={"kind": "list", "layers": [round(i * scale) for i in student["layers"]]})


def _similarity(path: Path, src_layers: int, dst_layers: int) -> dict[str, list[list[float]]]:
    """The matrices of a layer map, `(dst_layer, src_layer)` each.

    Raises:
        ValueError: the file is damaged, or was made for other models.
    """
    fix = f"delete it and run `kvpipe layer-map --teacher {path.stem}`"
    document = read_json(path, fix)
    similarity = document.get("similarity")
    if not isinstance(similarity, dict) or digest(similarity, 64) != document.get("sha256"):
        raise ValueError(f"layer map {path} is damaged: its numbers are not those that were measured; {fix}")
    sizes = {kind: (len(rows), *{len(row) for row in rows}) for kind, rows in similarity.items()}
    if sizes != dict.fromkeys(MEASURED, (dst_layers, src_layers)):
        raise ValueError(f"layer map {path}: expected {dst_layers} × {src_layers} layers, it has {sizes}; {fix}")
    return similarity


def _near(similarity: Float[Tensor, "dst_layer src_layer"], near: int | None) -> Float[Tensor, "dst_layer src_layer"]:
    """The similarity, with teacher layers further than `near` from the proportional one below all others."""
    if near is None:
        return similarity
    dst_layers, src_layers = similarity.shape
    centre = torch.tensor(proportional_map(src_layers, dst_layers))
    far = (torch.arange(src_layers) - centre[:, None]).abs() > near
    return similarity.masked_fill(far, similarity.min().item() - 1)


def write_layer_map(
    path: Path, teacher: str, similarity: dict[str, Float[Tensor, "dst_layer src_layer"]], rows: int
) -> None:
    """Save the similarity, and the layers and β that an arm with the default settings takes (each arm applies its own)."""
    dst_layers, src_layers = similarity["keys"].shape
    path.parent.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {
        "teacher": teacher,
        "src_layers": src_layers,
        "dst_layers": dst_layers,
        "rows": rows,
        "similarity": {kind: matrix.tolist() for kind, matrix in similarity.items()},
    }
    document["sha256"] = digest(document["similarity"], 64)
    write_json(path, document)
    plan = layer_plan(LayerConfig(kind="cka"), src_layers, dst_layers, path)
    document["top_k"] = {
        kind: {"layers": plan.index[i].tolist(), "beta": plan.beta[i].tolist()} for i, kind in enumerate(KINDS)
    }
    write_json(path, document)

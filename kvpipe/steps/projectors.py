"""Projectors of an arm from finished artefacts."""

from __future__ import annotations

from kvpipe.cache.capture import kv_geometry
from kvpipe.config import Arm
from kvpipe.distill.projectors import Geometry, Projector, build_projector, load_projectors
from kvpipe.experiment.sizes import count_parameters
from kvpipe.steps.inputs import Inputs


def geometry(inputs: Inputs, teacher: str) -> Geometry:
    """Heads and dimensions of teacher and student."""
    _, src_heads, src_dim = kv_geometry(inputs.model_config(teacher))
    dst_layers, dst_heads, dst_dim = kv_geometry(inputs.model_config(inputs.config.student))
    return Geometry(src_heads, src_dim, dst_heads, dst_dim, dst_layers)


def unfitted(inputs: Inputs, arm: Arm, layers: list[tuple[int, ...]]) -> list[Projector]:
    """New projectors of an arm, one per teacher, for rows that hold `layers` of each."""
    return [
        build_projector(
            arm.projector,
            geometry(inputs, teacher),
            inputs.plan(arm, teacher).within(stored),
            count_parameters(inputs.paths.model(teacher)),
        )
        for teacher, stored in zip(arm.teachers, layers, strict=True)
    ]


def fitted(inputs: Inputs, arm: Arm, layers: list[tuple[int, ...]]) -> list[Projector]:
    """The same from the file of the arm's fit."""
    projectors = unfitted(inputs, arm, layers)
    load_projectors(inputs.paths.projector(inputs.dag.fit_id(arm)), arm.teachers, projectors)
    return projectors

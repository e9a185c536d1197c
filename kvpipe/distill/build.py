"""Build what an arm adds to cross-entropy out of finished parts: nothing is read here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from kvpipe.cache.teacher import AlignedTeacher
from kvpipe.config import Arm
from kvpipe.distill.fusion import build_fusion
from kvpipe.distill.objectives import (
    Distiller,
    KVDistiller,
    LogitDistiller,
    RelationDistiller,
    TopLogits,
    build_targets,
)
from kvpipe.distill.projectors import Projector


def build_objective(
    arm: Arm,
    tasks: np.ndarray,
    teachers: Sequence[AlignedTeacher] = (),
    projectors: Sequence[Projector] = (),
    top_logits: Sequence[TopLogits] = (),
    teacher_losses: Float[Tensor, "teacher example"] | None = None,
    hidden_size: int = 0,
    hold_bytes: float = 0.0,
) -> Distiller | None:
    """The objective of an arm; None for one that learns from the text alone.

    Args:
        arm: decides the kind, and what of the following is looked at.
        tasks: of every training example.
        teachers: their caches on the student's positions; `kv` and `relation`.
        projectors: fitted, one for each teacher; `kv`.
        top_logits: of each teacher; `logit_kd`.
        teacher_losses: nats per example, which `select` fusion compares.
        hidden_size: the student's width, which `learnable` fusion reads.
        hold_bytes: room for the targets of frozen projectors, which are then computed once.
    """
    if arm.loss.kind == "none":
        return None
    if arm.loss.kind == "logit_kd":
        return LogitDistiller(arm, list(top_logits), tasks)
    if arm.loss.kind == "relation":
        return RelationDistiller(arm, teachers[0])
    options = {"weights": arm.fuse.weights, "learnable": arm.fuse.offsets} if arm.fuse.kind == "task" else {}
    if arm.fuse.kind == "fixed":
        options = {"weights": arm.fuse.weights["default"]}
    frozen, room = arm.projector.mode == "frozen", hold_bytes / len(teachers)
    return KVDistiller(
        arm,
        [build_targets(t, p, frozen, room) for t, p in zip(teachers, projectors, strict=True)],
        build_fusion(arm.fuse.kind, n_teachers=len(teachers), hidden_size=hidden_size, **options),
        tasks,
        teacher_losses,
    )

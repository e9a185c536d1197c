"""Build an arm's loss out of finished parts: nothing is read here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvpipe.cache.teacher import AlignedTeacher
from kvpipe.config import TERMS, Arm
from kvpipe.distill.fusion import build_fusion
from kvpipe.distill.objective import Objective, TopLogits
from kvpipe.distill.projectors import Projector
from kvpipe.distill.targets import FusedTargets, build_targets
from kvpipe.distill.terms import EntropyTerm, Facts, Term


def build_objective(
    arm: Arm,
    tasks: np.ndarray | None = None,
    facts: Facts | None = None,
    teachers: Sequence[AlignedTeacher] = (),
    projectors: Sequence[Projector] = (),
    top: Sequence[TopLogits] = (),
    hold_bytes: float = 0.0,
) -> Objective:
    """The loss of an arm.

    Args:
        arm: decides the terms, and what of the following is looked at.
        tasks: of every training example.
        facts: of student and teachers.
        teachers: what they say at the student's positions.
        projectors: fitted, one for each teacher; for terms on the fused caches.
        top: next-token candidates of each teacher.
        hold_bytes: room for the targets of frozen projectors, which are then computed once.
    """
    facts = facts or Facts()
    terms: dict[str, Term] = {
        name: TERMS.of(settings)(settings, facts) for name, settings in arm.terms.items() if settings.weight
    }
    if not arm.teachers:
        return Objective(terms, tasks=tasks)
    fusion, targets = build_fusion(arm.fuse, len(arm.teachers), facts.width), None
    if "targets" in arm.needs:
        frozen, room = arm.projector.mode == "frozen", hold_bytes / len(arm.teachers)
        targets = FusedTargets(
            [build_targets(t, p, frozen, room) for t, p in zip(teachers, projectors, strict=True)], fusion, arm.fuse
        )
        if weight := getattr(arm.fuse, "entropy", 0):
            terms["entropy"] = EntropyTerm(weight)
    known = fusion if arm.fuse.known_before else None
    return Objective(terms, arm.needs, tasks, teachers, targets, top, known)

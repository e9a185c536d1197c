"""Fit step: the projectors of all arms that share a fit."""

from __future__ import annotations

from typing import Any

import torch

from kvpipe.distill.fit import fit_projectors
from kvpipe.distill.projectors import save_projectors
from kvpipe.experiment.device import resolve_device
from kvpipe.models.folders import has_weights
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.projectors import unfitted


def make_fit(inputs: Inputs, fit: str) -> None:
    """The projectors of all arms that share a fit."""
    dag, config = inputs.dag, inputs.config
    arm = dag.fit_arm(fit)
    inputs.check(name for name, one in dag.arms.items() if dag.needs_fit(one) and dag.fit_id(one) == fit)
    # the fit sees the true pairs also for arms that shuffle them in training
    teachers = [inputs.aligned_teacher(arm.model_copy(update={"shuffle_teacher": False}), t) for t in arm.teachers]
    student = None
    if has_weights(inputs.paths.model(config.student)):
        student = inputs.student(0).to(resolve_device(config.train.device))
    torch.manual_seed(arm.fit.seed)  # an elastic encoder begins with random weights
    projectors = unfitted(inputs, arm, [teacher.layers for teacher in teachers])
    pad_id, dst = inputs.student_tokenizer.pad_token_id, inputs.student_encoding("train", arm)
    whole = inputs.whole_model() if arm.fit.basis == "whole" else None
    found = fit_projectors(projectors, teachers, arm.fit, student, dst, pad_id, config.store.batch_size, whole)
    document: dict[str, Any] = {
        "fit": dag.fit_spec(arm),
        "rows": found.rows,
        "explained_variance": dict(zip(arm.teachers, found.explained_variance, strict=True)),
    }
    if found.attention_output_cosine is not None:
        document["attention_output_cosine"] = dict(zip(arm.teachers, found.attention_output_cosine, strict=True))
    save_projectors(inputs.paths.projector(fit), arm.teachers, projectors, document)

"""Fit step: the projectors of all arms that share a fit."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kvpipe import fit
from kvpipe.batches import collate
from kvpipe.capture import capture
from kvpipe.cell import Workspace, save_projectors
from kvpipe.models import has_weights, resolve_device
from kvpipe.teacher import spread


def make_fit(work: Workspace, fit_id: str) -> None:
    """The projectors of all arms that share a fit."""
    arm = work.dag.fit_arm(fit_id)
    # the fit sees the true pairs also for arms that shuffle them in training
    teachers = [work.aligned_teacher(arm.model_copy(update={"content": "own"}), t) for t in arm.teachers]
    dst = work.student_encoding("train")
    examples = spread(len(dst), arm.fit.examples)
    length = int(dst.lengths[examples].max())
    aligned = [teacher.aligned(examples, length) for teacher in teachers]
    mask = torch.stack([a.mask for a in aligned]).all(0)
    rows = [fit.Rows(a.keys[mask], a.values[mask]) for a in aligned]
    student = None
    onto_student = arm.fit.method == "ridge" or arm.fit.basis == "student"
    if onto_student and has_weights(work.paths.model(work.config.student)):
        student = _student_rows(work, examples, mask)
    torch.manual_seed(arm.fit.seed)  # an elastic encoder begins with random weights
    projectors = work.new_projectors(arm, [teacher.layers for teacher in teachers])
    report = fit.fit(projectors, rows, arm.fit, student)
    document = {
        "fit": work.dag.fit_spec(arm),
        "rows": int(mask.sum()),
        "explained_variance": dict(zip(arm.teachers, report.explained_variance, strict=True)),
    }
    save_projectors(work.paths.projector(fit_id), arm.teachers, projectors, document)


def _student_rows(work: Workspace, examples: np.ndarray, mask: Tensor) -> fit.Rows:
    """The pretrained student's own keys and values at the masked positions of the examples, in their order."""
    dst, pad_id = work.student_encoding("train"), work.student_tokenizer.pad_token_id
    device = resolve_device(work.config.train.device)
    model = work.student(0).to(device)
    parts = []
    for start in range(0, len(examples), work.config.store.batch_size):
        rows = slice(start, start + work.config.store.batch_size)
        batch = collate(dst, examples[rows], pad_id).to(device)
        here = mask[rows, : batch.input_ids.shape[1]]
        kv = capture(model, batch.input_ids, batch.attention_mask)
        parts.append(
            [
                rearrange(x, "layer batch head time dim -> batch time layer head dim").cpu()[here]
                for x in (kv.keys, kv.values)
            ]
        )
    return fit.Rows(*(torch.cat(kind) for kind in zip(*parts, strict=True)))

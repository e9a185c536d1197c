"""Fit step: the projectors of all arms that share a fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from kvpipe.align.regime import positions_from_mask
from kvpipe.align.rope import Rope
from kvpipe.cache.attention import output_cosine
from kvpipe.cache.capture import Recorder
from kvpipe.cache.kv import KV
from kvpipe.data.batches import collate, spread
from kvpipe.distill import fit as fitting
from kvpipe.distill.projectors import save_projectors
from kvpipe.experiment.device import resolve_device
from kvpipe.models.folders import has_weights
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.projectors import unfitted


def make_fit(inputs: Inputs, fit: str) -> None:
    """The projectors of all arms that share a fit."""
    dag = inputs.dag
    arm = dag.fit_arm(fit)
    inputs.check(name for name, one in dag.arms.items() if dag.needs_fit(one) and dag.fit_id(one) == fit)
    # the fit sees the true pairs also for arms that shuffle them in training
    teachers = [inputs.aligned_teacher(arm.model_copy(update={"shuffle_teacher": False}), t) for t in arm.teachers]
    dst = inputs.student_encoding("train")
    examples = spread(len(dst), arm.fit.examples)
    length = int(dst.lengths[examples].max())
    aligned = [teacher.aligned(examples, length) for teacher in teachers]
    mask = torch.stack([a.mask for a in aligned]).all(0)
    rows = [fitting.Rows(a.keys[mask], a.values[mask]) for a in aligned]
    student = queries = None
    if has_weights(inputs.paths.model(inputs.config.student)):
        model = inputs.student(0).to(resolve_device(inputs.config.train.device))
        queries, own, ropes, positions = student_cache(inputs, model, examples, length)
        student = rows_of(own, mask)
    torch.manual_seed(arm.fit.seed)  # an elastic encoder begins with random weights
    projectors = unfitted(inputs, arm, [teacher.layers for teacher in teachers])
    report = fitting.fit(projectors, rows, arm.fit, student)
    document: dict[str, Any] = {
        "fit": dag.fit_spec(arm),
        "rows": int(mask.sum()),
        "explained_variance": dict(zip(arm.teachers, report.explained_variance, strict=True)),
    }
    if queries is not None:
        with torch.no_grad():
            targets = [p.eval()(a.keys, a.values) for p, a in zip(projectors, aligned, strict=True)]
        document["attention_output_cosine"] = {
            teacher: output_cosine(queries, own, target, ropes, mask, positions)
            for teacher, target in zip(arm.teachers, targets, strict=True)
        }
    save_projectors(inputs.paths.projector(fit), arm.teachers, projectors, document)


def rows_of(own: KV, mask: Tensor) -> fitting.Rows:
    """A cache's entries where `mask` (batch, time) is true, as rows."""
    layers_last = "layer batch head time dim -> batch time layer head dim"
    return fitting.Rows(*(rearrange(x, layers_last)[mask] for x in (own.keys, own.values)))


def student_cache(
    inputs: Inputs, model, examples: np.ndarray, length: int
) -> tuple[Tensor | None, KV, list[Rope], Tensor]:
    """A student's queries (None where its family shows none) and cache on the examples, padded to `length`,
    its layers' rotary embeddings, and the positions `(batch, time)`."""
    dst, pad_id, device = inputs.student_encoding("train"), inputs.student_tokenizer.pad_token_id, model.device
    parts: list[list[Tensor]] = []
    size = inputs.config.store.batch_size
    for some in (examples[i : i + size] for i in range(0, len(examples), size)):
        batch = collate(dst, some, pad_id).to(device)
        with torch.no_grad(), Recorder(model) as recorder:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        missing = (0, 0, 0, length - batch.input_ids.shape[1])
        kv = recorder.kv()
        seen = [kv.keys, kv.values, *([recorder.queries()] if recorder.sees_queries else [])]
        parts.append([pad(x, missing).cpu() for x in seen])
    keys, values, *queries = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    inside = torch.arange(length) < torch.from_numpy(dst.lengths[examples])[:, None]
    return queries[0] if queries else None, KV(keys, values), recorder.ropes, positions_from_mask(inside.long())

"""What an arm adds to cross-entropy, from finished artefacts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvpipe.align.timemap import shared_spans
from kvpipe.cache.store import forward_rows
from kvpipe.config import Arm
from kvpipe.distill.build import build_objective
from kvpipe.distill.objectives import Distiller, TopLogits
from kvpipe.experiment.files import GB
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.projectors import fitted
from kvpipe.tokens.matrix import common_prefix_positions
from kvpipe.tokens.vocabulary import same_tokens


def load_objective(inputs: Inputs, arm: Arm, seed: int) -> Distiller | None:
    """The arm's objective; of what it does not look at nothing is read.

    Args:
        inputs: the loaders.
        arm: resolved.
        seed: of the cell, by which `shuffle_teacher` pairs the examples.
    """
    if arm.loss.kind == "none":
        return None
    if arm.loss.kind == "logit_kd":
        return build_objective(arm, inputs.tasks, top_logits=[top_logits(inputs, teacher) for teacher in arm.teachers])
    teachers = [inputs.aligned_teacher(arm, teacher, seed) for teacher in arm.teachers]
    if arm.loss.kind == "relation":
        return build_objective(arm, inputs.tasks, teachers)
    return build_objective(
        arm,
        inputs.tasks,
        teachers,
        fitted(inputs, arm, [teacher.layers for teacher in teachers]),
        teacher_losses=teacher_losses(inputs, arm) if arm.fuse.kind == "select" else None,
        hidden_size=inputs.model_config(inputs.config.student).hidden_size,
        hold_bytes=inputs.config.train.hold_targets_gb * GB,
    )


def teacher_losses(inputs: Inputs, arm: Arm) -> Tensor:
    """Nats per example of each teacher, (teacher, example).

    Raises:
        ValueError: the teachers run live, whose losses are not known before training.
    """
    if inputs.config.store.mode != "stored":
        raise ValueError("fuse.kind: select needs store.mode: stored, which keeps the teachers' losses")
    out = []
    for teacher in arm.teachers:
        nll = inputs.store(teacher, arm.time.text).rows("nll")
        lengths = inputs.encoding(teacher, "train", arm.time.text).lengths
        out.append(torch.stack([part.sum() for part in nll.split(lengths.tolist())]))
    return torch.stack(out)


def top_logits(inputs: Inputs, teacher: str) -> TopLogits:
    """A teacher's next-token candidates on the student's rows, in student ids."""
    src, dst = inputs.encoding(teacher, "train"), inputs.student_encoding("train")
    if inputs.config.store.mode == "stored":
        store = inputs.store(teacher, "student")
        ids, logprobs = store.rows("top_ids"), store.rows("top_logprobs")
    else:
        model, pad_id = inputs.teacher_model(teacher), inputs.tokenizer(teacher).pad_token_id
        size, top = inputs.config.store.batch_size, inputs.config.store.top_logits
        found = forward_rows(model, src, np.arange(len(src)), (), size, pad_id, top)
        assert found.top_ids is not None and found.top_logprobs is not None
        ids, logprobs = found.top_ids, found.top_logprobs
    same = torch.from_numpy(same_tokens(inputs.tokenizer(teacher), inputs.student_tokenizer))
    return TopLogits.on_student(ids, logprobs, common_prefix_positions(*shared_spans(src, dst)), same, dst.offsets)

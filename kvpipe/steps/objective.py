"""An arm's loss, from finished artefacts."""

from __future__ import annotations

import numpy as np
import torch

from kvpipe.align.timemap import shared_spans
from kvpipe.cache.capture import kv_geometry
from kvpipe.cache.forward import Keep, forward_rows
from kvpipe.config import Arm
from kvpipe.distill.build import build_objective
from kvpipe.distill.objective import Objective, TopLogits
from kvpipe.distill.terms import Facts, TeacherFacts
from kvpipe.experiment.files import GB
from kvpipe.models.head import Head
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.projectors import fitted
from kvpipe.tokens.matrix import common_prefix_positions
from kvpipe.tokens.vocabulary import same_tokens


def load_objective(inputs: Inputs, arm: Arm, seed: int) -> Objective:
    """The loss of an arm; of what it does not look at nothing is read.

    Args:
        inputs: the loaders.
        arm: resolved.
        seed: of the cell, by which `shuffle_teacher` pairs the examples.
    """
    if not arm.teachers:
        return build_objective(arm, inputs.tasks)
    rows = bool(arm.needs - {"top_logits"})
    teachers = [inputs.aligned_teacher(arm, teacher, seed) for teacher in arm.teachers] if rows else []
    return build_objective(
        arm,
        inputs.tasks,
        facts(inputs, arm),
        teachers,
        fitted(inputs, arm, [teacher.layers for teacher in teachers]) if "targets" in arm.needs else [],
        [top_logits(inputs, teacher) for teacher in arm.teachers] if "top_logits" in arm.needs else [],
        inputs.config.train.hold_targets_gb * GB,
    )


def facts(inputs: Inputs, arm: Arm) -> Facts:
    """What terms know of the models before any text."""
    found = []
    for teacher in arm.teachers:
        config = inputs.model_config(teacher).get_text_config(decoder=True)
        hidden = inputs.hidden_layers(arm, teacher) if inputs.live else inputs.stored_hidden(teacher, arm.time.text)
        head = Head.of(inputs.teacher_model(teacher)) if "heads" in arm.needs else None
        found.append(TeacherFacts(kv_geometry(config).layers, config.hidden_size, hidden, head))
    own = inputs.model_config(inputs.config.student).get_text_config(decoder=True)
    return Facts(kv_geometry(own).layers, own.hidden_size, tuple(found))


def top_logits(inputs: Inputs, teacher: str) -> TopLogits:
    """A teacher's next-token candidates on the student's rows, in student ids."""
    src, dst = inputs.encoding(teacher, "train"), inputs.student_encoding("train")
    if inputs.live:
        model, pad_id = inputs.teacher_model(teacher), inputs.tokenizer(teacher).pad_token_id
        keep = Keep(top=inputs.config.store.top_logits)
        found = forward_rows(model, src, np.arange(len(src)), keep, inputs.config.store.batch_size, pad_id)
        ids, logprobs = found.named()["top_ids"], found.named()["top_logprobs"]
    else:
        store = inputs.store(teacher, "student")
        ids, logprobs = store.rows("top_ids"), store.rows("top_logprobs")
    same = torch.from_numpy(same_tokens(inputs.tokenizer(teacher), inputs.student_tokenizer))
    return TopLogits.on_student(ids, logprobs, common_prefix_positions(*shared_spans(src, dst)), same, dst.offsets)

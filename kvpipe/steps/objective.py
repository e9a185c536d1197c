"""An arm's loss, from finished artefacts."""

from __future__ import annotations

from dataclasses import replace

import torch

from kvpipe.align.timemap import shared_spans
from kvpipe.cache.capture import kv_geometry
from kvpipe.config import Arm, ConfigError
from kvpipe.data.chat import rendered
from kvpipe.distill.build import build_objective
from kvpipe.distill.objective import Objective, TopLogits
from kvpipe.distill.terms import Facts, TeacherFacts
from kvpipe.experiment.files import GB
from kvpipe.models.head import Head
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.projectors import fitted
from kvpipe.tokens.matrix import common_prefix_positions
from kvpipe.tokens.vocabulary import same_tokens
from kvpipe.train.online import OnPolicy, Reader


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
        0.0 if arm.on_policy else inputs.config.train.hold_targets_gb * GB,
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
    same = torch.from_numpy(same_tokens(inputs.tokenizer(teacher), inputs.student_tokenizer))
    if inputs.live:
        model, pad_id = inputs.teacher_model(teacher), inputs.tokenizer(teacher).pad_token_id
        top, size = inputs.config.store.top_logits, inputs.config.store.batch_size
        return TopLogits.live(model, src, dst, same, top, size, pad_id)
    store, pairs = inputs.store(teacher, "student"), common_prefix_positions(*shared_spans(src, dst))
    return TopLogits.on_student(store.rows("top_ids"), store.rows("top_logprobs"), pairs, same, dst.offsets)


def load_on_policy(inputs: Inputs, arm: Arm, objective: Objective, seed: int) -> OnPolicy | None:
    """What the student writes itself in an arm that asks for it; its teachers are loaded, whatever is stored of others.

    Raises:
        ConfigError: a training record has no prompt.
    """
    if arm.on_policy is None:
        return None
    records, config = inputs.records("train"), inputs.config
    if empty := [record.id for record in records if not record.prompt]:
        raise ConfigError(
            f"on_policy: record {empty[0]!r} has no prompt for the student to continue ({len(empty)} such)"
        )
    kept = {teacher.name: (teacher.layers, teacher.source.hidden) for teacher in objective.teachers}

    def reader(name: str) -> Reader:
        tokenizer = inputs.tokenizer(name)
        prompts = [rendered(tokenizer, record, config.data.template).prompt for record in records]
        return Reader(name, tokenizer, prompts)

    teachers = [
        replace(reader(name), model=inputs.teacher_model(name), layers=layers, hidden=hidden)
        for name in arm.teachers
        for layers, hidden in [kept.get(name, ((), ()))]
    ]
    chat, top, size = config.data.template.chat_template, config.store.top_logits, config.evaluate.batch_size
    return OnPolicy(arm, reader(config.student), teachers, chat, top, size, seed)

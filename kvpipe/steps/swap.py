"""How well a student goes on from its teacher's cache of the prompt instead of its own: interchangeable caches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache

from kvpipe.align.timemap import build_time_map
from kvpipe.config import PROJECTORS, Arm, FitConfig
from kvpipe.data.encoding import encode_records
from kvpipe.data.records import Record
from kvpipe.distill.fit import fit_projectors
from kvpipe.distill.projectors import Projector
from kvpipe.distill.translate import translate_cache
from kvpipe.steps.inputs import Inputs
from kvpipe.steps.projectors import fitted, unfitted

EXAMPLES = 64
"""Training examples on whose tokens a map is fitted after training."""


@torch.no_grad()
def swapped_nll(inputs: Inputs, arm_name: str, student, records: list[Record]) -> dict[str, np.ndarray]:
    """Nats of reasoning and answer per record where the prompt's cache, all but its last token, is another one.

    Args:
        inputs: the loaders; the arm's store and projectors are there.
        arm_name: by whose time, layers and projectors the teacher's cache is translated.
        student: of a cell, in evaluation mode.
        records: what is scored.

    Returns:
        `nll_swap`: from the teacher's cache as the arm's projectors give it; `nll_swap_ridge`: by a map fitted onto the
        student's own cache now; `nll_no_prompt`: from the prompt's last token alone. Tokens are those of the items' `nll`.

    Raises:
        ValueError: a prompt has no two tokens, or is longer than a sliding window of the teacher.
    """
    arm = inputs.dag.arm(arm_name)
    (teacher,) = arm.teachers
    template, source = inputs.config.data.template, inputs.aligned_teacher(arm, teacher)
    layers = source.layers
    maps = {"nll_swap": fitted(inputs, arm, [layers])[0], "nll_swap_ridge": ridge_after(inputs, arm, student)}
    model = inputs.teacher_model(teacher)
    dst = encode_records(records, inputs.student_tokenizer, template)
    src = encode_records(records, inputs.tokenizer(teacher), template)
    time = build_time_map(arm.time, src, dst)
    found = {name: np.zeros(len(records)) for name in (*maps, "nll_no_prompt")}
    for example, record in enumerate(records):
        rows, read = dst.rows(example), int(src.segments[example, 0, 1])
        first = int(dst.segments[example, 0, 1]) - 1
        if first < 1 or read < 1:
            raise ValueError(f"evaluate.cache_swap: the prompt of record {record.id!r} has no two tokens to translate")
        ids = torch.from_numpy(dst.ids[rows]).to(student.device)
        with_bytes = dst.spans[rows, 1] > dst.spans[rows, 0]
        counted = torch.from_numpy(with_bytes & dst.completion(example))[first + 1 :]
        prompt = torch.from_numpy(src.ids[src.rows(example)][:read])[None].to(model.device)
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        here = slice(rows.start, rows.start + first)
        index, weight = time.index[here] - int(src.offsets[example]), time.weight[here]
        weight = weight * (index < read)  # of a token that the prompt's end cuts, nothing is known yet
        overlap = index.clamp(0, read - 1), weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
        for name, projector in maps.items():
            translated = translate_cache(cache, model, student, projector, layers, overlap)
            found[name][example] = nll_after(student, ids[first:], counted, translated)
        found["nll_no_prompt"][example] = nll_after(student, ids[first:], counted, None)
    return found


def nll_after(student, ids: Tensor, counted: Tensor, cache: Cache | None) -> float:
    """Nats of the tokens after the first that are `counted`, behind what a cache holds."""
    logits = student(input_ids=ids[None], past_key_values=cache, use_cache=cache is not None).logits[0, :-1]
    losses = cross_entropy(logits.float(), ids[1:], reduction="none").cpu()
    return float(losses[counted].double().sum())


def ridge_after(inputs: Inputs, arm: Arm, student) -> Projector:
    """A linear map of the arm's teacher onto the cache of a trained student, fitted on training texts: the usual way."""
    after = arm.model_copy(
        update={
            "projector": PROJECTORS(),
            "fit": FitConfig(method="ridge", examples=EXAMPLES),
            "shuffle_teacher": False,
        }
    )
    (teacher,) = arm.teachers
    source, dst = inputs.aligned_teacher(after, teacher), inputs.student_encoding("train", arm)
    (projector,) = unfitted(inputs, after, [source.layers])
    pad_id, size = inputs.student_tokenizer.pad_token_id, inputs.config.store.batch_size
    fit_projectors([projector], [source], after.fit, student, dst, pad_id, size)
    return projector.eval()

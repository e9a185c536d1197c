"""Layer-map step: the similarity of the student's and a teacher's layers."""

from __future__ import annotations

import torch
from einops import rearrange

from kvpipe.align import layermap
from kvpipe.align.layer import StreamingCKA
from kvpipe.align.timemap import build_time_map
from kvpipe.cache.capture import Recorder, kv_geometry
from kvpipe.cache.teacher import AlignedTeacher, LiveRows
from kvpipe.config import TimeConfig
from kvpipe.data.batches import collate, schedule, spread
from kvpipe.distill.losses import masked_mean
from kvpipe.experiment.device import resolve_device
from kvpipe.experiment.progress import track
from kvpipe.models.folders import has_weights
from kvpipe.models.head import Head, final_states
from kvpipe.models.likelihood import token_nll
from kvpipe.steps.inputs import Inputs


def make_layer_map(inputs: Inputs, teacher: str) -> None:
    """CKA of every student layer with every teacher layer on token-aligned rows of validation examples.

    A student from scratch has random layers, which resemble nothing: a copy is first trained for some steps on
    cross-entropy alone (seed 0, training split), as a stand-in for what its layers become.
    """
    config = inputs.config.layer_map
    inputs.check(inputs.dag.arms_of(teacher))
    model, pad_id = inputs.teacher_model(teacher), inputs.tokenizer(teacher).pad_token_id
    src = inputs.encoding(teacher, "validation")
    dst = inputs.student_encoding("validation")
    time = build_time_map(TimeConfig(), src, dst)
    reference = _reference_student(inputs)
    device, head = next(reference.parameters()).device, Head.of(reference)
    size = inputs.config.store.batch_size
    layers = tuple(range(kv_geometry(model.config).layers))
    aligned_teacher = AlignedTeacher(teacher, LiveRows(model, src, layers, pad_id, size, layers), src, dst, time)
    examples = spread(len(dst), config.examples)
    streams = {kind: StreamingCKA() for kind in layermap.MEASURED}
    rows = 0
    parted = [examples[i : i + size] for i in range(0, len(examples), size)]
    for chunk in track(parted, f"layers of {teacher}", "examples", len):
        batch = collate(dst, chunk, inputs.student_tokenizer.pad_token_id)
        with torch.no_grad(), Recorder(reference, hidden=True) as recorder:
            moved = batch.to(device)
            given = {"input_ids": moved.input_ids, "attention_mask": moved.attention_mask, "use_cache": False}
            final_states(reference, head, **given)  # of logits none
        kv, hidden = recorder.kv().to("cpu"), recorder.hidden_states().cpu()
        theirs = aligned_teacher.aligned(chunk, batch.input_ids.shape[1], layermap.MEASURED)
        mask = batch.mask & theirs.mask
        rows += int(mask.sum())
        streams["keys"].update(_student_rows(kv.keys, mask), _teacher_rows(theirs.keys, mask))
        streams["values"].update(_student_rows(kv.values, mask), _teacher_rows(theirs.values, mask))
        streams["hidden"].update(
            hidden[:, mask], rearrange(theirs.columns["hidden"][mask], "row layer width -> layer row width")
        )
    similarity = {kind: stream.compute() for kind, stream in streams.items()}
    layermap.write_layer_map(inputs.paths.layer_map(teacher), teacher, similarity, rows)


def _student_rows(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return rearrange(x, "layer batch head time dim -> layer batch time (head dim)")[:, mask]


def _teacher_rows(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return rearrange(x[mask], "row layer head dim -> layer row (head dim)")


def _reference_student(inputs: Inputs):
    device = resolve_device(inputs.config.train.device)
    model = inputs.student(seed=0).to(device)
    steps = inputs.config.layer_map.warmup_steps
    if has_weights(inputs.paths.model(inputs.config.student)) or steps == 0:
        return model
    encoding = inputs.student_encoding("train")
    pad_id = inputs.student_tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=inputs.config.train.learning_rate, fused=True)
    for examples in schedule(encoding.lengths, inputs.config.train.batch_size, steps, seed=0, by_length=True):
        batch = collate(encoding, examples, pad_id, inputs.config.train.loss_on).to(device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        masked_mean(token_nll(logits, batch.labels), batch.predicted).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()

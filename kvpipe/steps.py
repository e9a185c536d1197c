"""One function per step of the DAG: read finished artefacts, call one function, write one artefact."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from kvpipe import data, fit, layermap, store
from kvpipe.align.layer import StreamingCKA
from kvpipe.batches import collate, schedule
from kvpipe.capture import capture, kv_geometry
from kvpipe.cell import Workspace, save_projectors
from kvpipe.config import HubModel, LocalModel, PretrainModel, RandomModel, ScratchModel, TimeConfig
from kvpipe.losses import masked_mean, token_nll
from kvpipe.models import (
    fetch_hub,
    fetch_local,
    has_weights,
    load_config,
    load_model,
    load_tokenizer,
    randomise,
    write_manifest,
)
from kvpipe.pretrain import pretrain, student_tokenizer
from kvpipe.shapes import KV
from kvpipe.teacher import AlignedTeacher, LiveRows
from kvpipe.timemap import build_time_map


def make_data(work: Workspace) -> None:
    """The splits."""
    data.build(work.config.data, work.paths.data("train").parent)


def make_model(work: Workspace, name: str) -> None:
    """One model folder and its manifest."""
    model = work.config.models[name]
    out = work.paths.model(name)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    match model:
        case LocalModel():
            source = fetch_local(Path(model.path), out)
        case PretrainModel():
            source = pretrain(model.recipe, work.config.data, out)
        case HubModel():
            source = fetch_hub(model.repo, model.revision, out)
        case RandomModel():
            source = randomise(work.paths.model(model.like), out, model.seed)
        case ScratchModel():
            tokenizer = student_tokenizer(model.tokenizer, work.records("train"), work.config.data)
            tokenizer.save_pretrained(out)
            work.student(seed=0).config.save_pretrained(out)
            source = model.model_dump()
    write_manifest(out, source)


def make_layer_map(work: Workspace, teacher: str) -> None:
    """CKA of every student layer with every teacher layer on token-aligned rows of validation examples.

    A student from scratch has random layers, which resemble nothing: a copy is first trained for some steps on
    cross-entropy alone (seed 0, training split), as a stand-in for what its layers become.
    """
    config = work.config.layer_map
    reference = _reference_student(work)
    folder = work.paths.model(teacher)
    model, pad_id = load_model(folder), load_tokenizer(folder).pad_token_id
    src = work.teacher_encoding(teacher, "validation", "student")
    dst = work.student_encoding("validation")
    time = build_time_map(TimeConfig(), src, dst)
    layers = tuple(range(kv_geometry(model.config).layers))
    live = LiveRows(model, src, layers, pad_id)
    aligned = AlignedTeacher(teacher, live, src.offsets, dst.offsets, time)
    examples = _spread(len(dst), config.examples)
    streams = {kind: StreamingCKA() for kind in layermap.KINDS}
    rows = 0
    for chunk in (
        examples[i : i + work.config.store.batch_size] for i in range(0, len(examples), work.config.store.batch_size)
    ):
        batch = collate(dst, chunk, work.student_tokenizer.pad_token_id)
        own = capture(reference, batch.input_ids, batch.attention_mask)
        theirs = aligned.aligned(chunk, batch.input_ids.shape[1])
        mask = batch.mask & theirs.mask
        rows += int(mask.sum())
        for kind in layermap.KINDS:
            streams[kind].update(_student_rows(own, kind, mask), _teacher_rows(getattr(theirs, kind), mask))
    similarity = {kind: stream.compute() for kind, stream in streams.items()}
    layermap.write_layer_map(work.paths.layer_map(teacher), teacher, similarity, rows)


def _student_rows(kv: KV, kind: str, mask: torch.Tensor) -> torch.Tensor:
    x = rearrange(getattr(kv, kind), "layer batch head time dim -> layer batch time (head dim)")
    return x[:, mask]


def _teacher_rows(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return rearrange(x[mask], "row layer head dim -> layer row (head dim)")


def _spread(count: int, wanted: int):
    """`wanted` numbers spread over 0 … count − 1, so that every task is among them."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))


def _reference_student(work: Workspace):
    model = work.student(seed=0)
    steps = work.config.layer_map.warmup_steps
    if has_weights(work.paths.model(work.config.student)) or steps == 0:
        return model
    encoding = work.student_encoding("train")
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=work.config.train.learning_rate, fused=True)
    for examples in schedule(encoding.lengths, work.config.train.batch_size, steps, seed=0, by_length=True):
        batch = collate(encoding, examples, work.student_tokenizer.pad_token_id)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        masked_mean(token_nll(logits, batch.labels), batch.mask).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def make_shard(work: Workspace, teacher: str, reading, shard: int) -> None:
    """One shard of a teacher's store."""
    config = work.config.store
    folder = work.paths.model(teacher)
    model_config = load_config(folder)
    encoding = work.teacher_encoding(teacher, "train", reading)
    key = work.store_key(teacher, reading)
    path = work.paths.shard(teacher, reading, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    need = store.estimate_bytes(config, kv_geometry(model_config), len(key.layers), len(encoding.ids), key.top_logits)
    store.check_budget(config, teacher, need, path.parent)
    store.build_shard(load_model(folder), encoding, key, config, shard, path, load_tokenizer(folder).pad_token_id)


def shards_of(work: Workspace) -> range:
    """Numbers of the shards of a store."""
    return range(store.shard_count(len(work.records("train")), work.config.store.shard_examples))


def make_store_index(work: Workspace, teacher: str, reading) -> None:
    """The index of a store whose shards are there."""
    shards = [work.paths.shard(teacher, reading, i) for i in shards_of(work)]
    store.write_index(work.paths.store(teacher, reading), work.store_key(teacher, reading), shards)


def make_fit(work: Workspace, fit_id: str) -> None:
    """The projectors of all arms that share a fit."""
    arm = work.dag.fit_arm(fit_id)
    # the fit sees the true pairs also for arms that shuffle them in training
    teachers = [work.aligned_teacher(arm.model_copy(update={"content": "own"}), t) for t in arm.teachers]
    dst = work.student_encoding("train")
    examples = _spread(len(dst), arm.fit.examples)
    length = int(dst.lengths[examples].max())
    aligned = [teacher.aligned(examples, length) for teacher in teachers]
    mask = torch.stack([a.mask for a in aligned]).all(0)
    rows = [fit.Rows(a.keys[mask], a.values[mask]) for a in aligned]
    student = None
    if arm.fit.method == "ridge" and has_weights(work.paths.model(work.config.student)):
        batch = collate(dst, examples, work.student_tokenizer.pad_token_id)
        kv = capture(work.student(0), batch.input_ids, batch.attention_mask)
        student = fit.Rows(
            *(
                rearrange(x, "layer batch head time dim -> batch time layer head dim")[mask]
                for x in (kv.keys, kv.values)
            )
        )
    projectors = work.new_projectors(arm, [teacher.layers for teacher in teachers])
    report = fit.fit(projectors, rows, arm.fit, student)
    document = {
        "fit": work.dag.fit_spec(arm),
        "rows": int(mask.sum()),
        "explained_variance": dict(zip(arm.teachers, report.explained_variance, strict=True)),
    }
    save_projectors(work.paths.projector(fit_id), arm.teachers, projectors, document)


def make_all_before_training(work: Workspace, arm_name: str, log=print) -> None:
    """What a cell needs, made here where it is missing: `kvpipe train` without Snakemake."""
    arm = work.dag.arm(arm_name)
    paths = work.paths
    if not paths.data("train").is_file():
        log("data …")
        make_data(work)
    names = [work.config.student, *(n for t in arm.teachers for n in _with_like(work, t))]
    for name in names:
        if not (paths.model(name) / "MANIFEST.json").is_file():
            log(f"model {name} …")
            make_model(work, name)
    for teacher in arm.teachers:
        wanted = work.dag.needs_layer_map(arm) or work.dag.store_needs_layer_map(teacher)
        if wanted and not paths.layer_map(teacher).is_file():
            log(f"layer map of {teacher} …")
            make_layer_map(work, teacher)
    for teacher in arm.teachers if work.dag.uses_store(arm) else []:
        if not (paths.store(teacher, arm.time.text) / store.INDEX).is_file():
            log(f"KV of {teacher} …")
            for shard in shards_of(work):
                make_shard(work, teacher, arm.time.text, shard)
            make_store_index(work, teacher, arm.time.text)
    if work.dag.needs_fit(arm) and not paths.projector(work.dag.fit_id(arm)).is_file():
        log("fit …")
        make_fit(work, work.dag.fit_id(arm))


def _with_like(work: Workspace, name: str) -> list[str]:
    model = work.config.models[name]
    return [model.like, name] if isinstance(model, RandomModel) else [name]

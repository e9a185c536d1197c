"""Whether the steps' memory suffices: an estimate of each against what this machine has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil

from kvpipe.config import GENERATED
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding
from kvpipe.doctor.look import nvidia
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.files import GB
from kvpipe.experiment.launch import in_job
from kvpipe.experiment.sizes import (
    BASE,
    CUDA_BASE,
    Shape,
    rows_bytes,
    scoring_bytes,
    teacher_pass_bytes,
    training_bytes,
    writing_bytes,
)


class Need(NamedTuple):
    """Estimated memory of one step's largest job, in bytes."""

    rule: str
    name: str
    about: str
    host: float
    gpu: float | None
    """None where the model is spread over all GPUs that there are."""
    fix: str
    """What makes the GPU's smaller."""


def check_memory(work: Workload) -> Iterator[Finding]:
    """Findings on host and GPU memory of the steps whose models' shapes are known."""
    if in_job():  # in the image on a login node, or in a job: not where the others run
        return
    seen = nvidia() if work.config.train.device != "cpu" else None
    room = float(seen["memory"]) if seen and seen["memory"] else None
    total = float(psutil.virtual_memory().total)
    for need in needs(work, lambda rule: int(room is not None)):
        detail = f"{need.about}: about {need.host / GB:.1f} GB, this machine has {total / GB:.1f} GB"
        fix = "run it where there is more memory, or raise train.accumulate, set train.lora, or more store.shards"
        yield compare(f"memory of {need.name}", detail, need.host, total, fix)
        if room is not None and need.gpu is not None:
            yield compare_gpu(need, room)
    if work.shape(work.config.student) is None:
        yield Finding("memory", OK, f"can be estimated once the model {work.config.student} is here")


def compare(name: str, detail: str, need: float, room: float, fix: str) -> Finding:
    """An estimate is off by a fifth at times: only what is clearly too large would fail."""
    if need <= room:
        return Finding(name, OK, detail)
    return Finding(name, FAIL if need > 1.2 * room else WARNING, detail, fix)


def compare_gpu(need: Need, room: float) -> Finding:
    """The same of a GPU, of which a part is never free."""
    assert need.gpu is not None
    detail = f"{need.about}: about {need.gpu / GB:.1f} GB, a GPU has {room / GB:.1f} GB"
    return compare(f"GPU memory of {need.name}", detail, need.gpu, 0.95 * room, need.fix)


def needs(work: Workload, gpus: Callable[[str], int]) -> Iterator[Need]:
    """What the steps take whose models' shapes are known.

    Args:
        gpus: rule → GPUs of its job, over all nodes.
    """
    student = work.shape(work.config.student)
    if student is None:
        return

    def process(rule: str) -> float:
        return BASE + (CUDA_BASE if gpus(rule) else 0)

    yield _training(work, student, gpus("train"), process("train"))
    rule = "teacher_kv_shard" if work.config.store.shards > 1 else "teacher_kv"
    host = {pair: need for pair in work.missing_stores if (need := work.pass_bytes(*pair)) is not None}
    if host:
        largest = max(host, key=host.__getitem__)
        whole = {
            pair: float(work.pass_bytes(*pair, on_gpu=True) or 0) for pair in host if not work.loading(pair[0]).sharded
        }
        at = max(whole, key=whole.__getitem__) if whole else largest
        about = f"the largest, {'/'.join(largest)}"
        fix = f"models.{at[0]}.load: {{dtype: bf16}} or {{quantize: int8}}, or a lower store.batch_size"
        yield Need(rule, "teacher KV", about, process(rule) + host[largest], whole.get(at), fix)
    yield from _texts(work, process)
    yield from _fits(work, student, process)
    new = max(scoring.max_new_tokens for scoring in (work.config.evaluate, *work.config.evaluate.tasks.values()))
    at_once = work.config.evaluate.batch_size * (work.longest(work.config.student) + new)
    tasks = {task for source in work.config.data.sources for task in source.task_names}
    grown = any(work.config.evaluate.of(task).scorer in GENERATED for task in tasks)
    scored = scoring_bytes(student, at_once, cached=grown)
    for rule in ("evaluate", "untrained", "lm_eval"):
        about = f"{work.config.evaluate.batch_size} texts side by side"
        yield Need(rule, f"scoring ({rule})", about, process(rule) + scored, scored, "a lower evaluate.batch_size")
    judged = [shape for name in work.dag.judged_teachers if (shape := work.shape(name))]
    if judged:
        scored = max(scoring_bytes(shape, at_once, cached=grown) for shape in judged)
        rule, whole_host = "teacher_quality", process("teacher_quality") + scored
        yield Need(
            rule, "scoring (teacher_quality)", "the largest teacher", whole_host, scored, "a lower evaluate.batch_size"
        )


def _texts(work: Workload, process: Callable[[str], float]) -> Iterator[Need]:
    """Teachers that write texts of their own."""
    config, found = work.config.teacher_text, {}
    for name in {teacher for arm in work.dag.arms.values() if arm.time.text == "written" for teacher in arm.teachers}:
        if (shape := work.shape(name)) is not None and work.examples:
            each = work.longest(name) + config.max_new_tokens
            rows = min(max(1, config.batch_tokens // each), work.examples)
            width = 4.0 if work.loading(name).dtype == "fp32" else 2.0
            found[name] = (writing_bytes(shape, rows * each, rows, width), rows)
    if found:
        name = max(found, key=lambda name: found[name][0])
        rule = "teacher_text_shard" if config.shards > 1 else "teacher_text"
        need, rows = found[name]
        about = f"the largest, {name}, {rows} texts side by side"
        yield Need(rule, "teachers' texts", about, process(rule) + need, need, "a lower teacher_text.batch_tokens")


def _training(work: Workload, student: Shape, gpus: int, base: float) -> Need:
    config = work.config.train
    micro = math.ceil(config.batch_size / config.accumulate / max(1, gpus))
    tokens = micro * work.longest(work.config.student)
    arms = work.dag.arms.values()
    matched = student.layers * max((sum(f"{kind}" in arm.loss for kind in _KINDS) for arm in arms), default=0)
    training = training_bytes(student, config, tokens, matched, gpus > 0, gpus)
    live = _teachers_bytes(work) if work.config.store.mode == "live" else 0.0
    host = base + _targets_bytes(work, student) + (4 * student.parameters if gpus else training + live)
    size = f"{student.parameters / 1e6:.3g} million parameters"
    about = f"a cell of {size}, {micro} texts of about {tokens // micro} tokens at once"
    smaller = "train.gradient_checkpointing: true, train.precision: bf16 or train.lora"
    fix = f"train.accumulate × 2 (the same batch in smaller parts), {smaller}"
    return Need("train", "training", about, host, training + live, fix)


_KINDS = ("keys", "values", "attention")
"""Terms that look at the student's caches of all layers."""


def _teachers_bytes(work: Workload) -> float:
    """Teachers that a cell holds and asks as it trains."""
    costs = {
        (teacher, arm.time.text): work.pass_bytes(teacher, arm.time.text) or 0
        for arm in work.dag.arms.values()
        for teacher in arm.teachers
    }
    sums = [sum(costs[teacher, arm.time.text] for teacher in arm.teachers) for arm in work.dag.arms.values()]
    return float(max(sums, default=0))


def _fits(work: Workload, student: Shape, process: Callable[[str], float]) -> Iterator[Need]:
    """Rows of all teachers of an arm, and those of layer maps, of one teacher and some examples at a time."""
    mean = work.tokens(work.config.student) / max(1, work.examples)
    sides = {name: (shape, work.stored_layers(name)) for name in work.dag.teachers if (shape := work.shape(name))}
    fits = []
    for arm in map(work.dag.fit_arm, work.dag.fits):
        teachers = [sides[name] for name in arm.teachers if name in sides]
        fits.append(rows_bytes(teachers, student, round(mean * min(arm.fit.examples, work.examples))))
    if fits:
        yield Need("fit", "fits", "the largest", process("fit") + max(fits), None, "a lower fit.examples")
    rows = round(mean * work.config.store.batch_size)
    maps = [
        rows_bytes([(shape, shape.layers)], student, rows) + teacher_pass_bytes(shape, shape.layers, round(2 * mean))
        for shape, _ in sides.values()
    ]
    if maps and work.dag.mapped_teachers:
        host = process("layer_map") + max(maps)
        yield Need("layer_map", "layer maps", "the largest", host, None, "a lower store.batch_size")


def _targets_bytes(work: Workload, student: Shape) -> float:
    """Targets that a cell holds: keys and values in the student's shape for every training token, if they fit."""
    teachers = max((len(arm.teachers) for arm in work.dag.arms.values() if "targets" in arm.needs), default=0)
    numbers = teachers * work.tokens(work.config.student) * 2 * student.layers * student.kv_heads * student.head_dim
    return 4.0 * numbers if 4.0 * numbers <= work.config.train.hold_targets_gb * GB else 0.0


def mem_mb(need: Need) -> int:
    """MB of the host for a step, with a quarter to spare, in whole GB."""
    return math.ceil(1.25 * need.host / GB) * 1000


def job_memory(work: Workload, gpus: Callable[[str], int] = lambda rule: 0) -> dict[str, int]:
    """Rule → MB of its largest job, of the rules that can be estimated yet; that of shards for what puts them together, too."""
    try:
        found = {need.rule: mem_mb(need) for need in needs(work, gpus)}
    except (OSError, ValueError):  # a damaged file: the step that reads it says so
        return {}
    for rule in ("teacher_kv", "teacher_text"):
        if rule not in found and (shard := found.get(f"{rule}_shard")):
            found[rule] = shard
    return found

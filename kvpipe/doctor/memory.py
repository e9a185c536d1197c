"""Whether the steps' memory suffices: an estimate of each against what this machine has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import psutil

from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding
from kvpipe.doctor.look import nvidia
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.files import GB
from kvpipe.experiment.launch import in_job
from kvpipe.experiment.sizes import Shape, training_bytes

BASE = 1.5 * GB
"""Python, torch and transformers themselves."""


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
    yield _training(work, student, gpus("train"))
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
        yield Need(rule, "teacher KV", about, BASE + host[largest], whole.get(at), fix)


def _training(work: Workload, student: Shape, gpus: int) -> Need:
    config = work.config.train
    micro = math.ceil(config.batch_size / config.accumulate / max(1, gpus))
    mean = work.tokens(work.config.student) / max(1, work.examples)
    # a batch is padded to its longest text, which is not known before it is tokenized
    tokens = micro * min(config.max_length, round(1.5 * mean) or config.max_length)
    training = float(training_bytes(student, config, tokens))
    host = BASE + _targets_bytes(work, student) + (4 * student.parameters if gpus else training)
    size = f"{student.parameters / 1e6:.3g} million parameters"
    about = f"a cell of {size}, {micro} texts of about {tokens // micro} tokens at once"
    smaller = "train.gradient_checkpointing: true, train.precision: bf16 or train.lora"
    fix = f"train.accumulate × 2 (the same batch in smaller parts), {smaller}"
    return Need("train", "training", about, host, training, fix)


def _targets_bytes(work: Workload, student: Shape) -> float:
    """Targets that a cell holds: keys and values in the student's shape for every training token, if they fit."""
    teachers = max((len(arm.teachers) for arm in work.dag.arms.values() if "targets" in arm.needs), default=0)
    numbers = teachers * work.tokens(work.config.student) * 2 * student.layers * student.kv_heads * student.head_dim
    return min(work.config.train.hold_targets_gb * GB, 4.0 * numbers)

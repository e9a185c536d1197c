"""Whether the jobs' memory suffices: an estimate per step against what is asked for, or what this machine has."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator

import psutil

from kvpipe.config import Config
from kvpipe.doctor.asked import Asked
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding, ask, inside_a_job
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.files import GB
from kvpipe.experiment.paths import Paths
from kvpipe.experiment.sizes import Shape, training_bytes

MIB = float(2**20)
BASE = 1.5 * GB
"""Python, torch and transformers themselves."""
SMALLER = (
    "train.accumulate × 2 (the same batch in smaller parts), train.gradient_checkpointing: true, "
    "train.precision: bf16 or train.lora"
)
"""What `kvpipe doctor --probe` saw, under the results."""


def examine_memory(config: Config, paths: Paths, asked: Asked) -> list[Finding]:
    """Findings on host and GPU memory of the steps whose models' shapes are known."""
    work = Workload(config, paths)
    student = work.shape(config.student)
    if student is None:
        return [Finding("memory", OK, f"can be estimated once the model {config.student} is here")]
    gpu = asked.of("train").gpus
    micro = math.ceil(config.train.batch_size / config.train.accumulate / max(1, gpu))
    mean = work.tokens(config.student) / max(1, work.examples)
    # a batch is padded to its longest text, which is not known before it is tokenized
    tokens = micro * min(config.train.max_length, round(1.5 * mean) or config.train.max_length)
    training = training_bytes(student, config.train, tokens)
    held = _targets_bytes(work, student)
    size = f"{student.parameters / 1e6:.3g} million parameters"
    where = f"a cell of {size}, {micro} texts of about {tokens // micro} tokens at once"
    on_gpu = bool(gpu) and shutil.which("sbatch") is not None
    host = BASE + held + (4 * student.parameters if on_gpu else training)
    return [
        *_host("memory of training", where, host, asked, "train"),
        *_gpu("GPU memory", where, float(training), SMALLER, paths, asked, "train"),
        *_teachers(work, paths, asked),
    ]


def _targets_bytes(work: Workload, student: Shape) -> float:
    """Targets that a cell holds: keys and values in the student's shape for every training token, if they fit."""
    most = work.config.train.hold_targets_gb * GB
    teachers = max((len(arm.teachers) for arm in work.dag.arms.values() if arm.loss.kind == "kv"), default=0)
    numbers = teachers * work.tokens(work.config.student) * 2 * student.layers * student.kv_heads * student.head_dim
    return min(most, 4.0 * numbers)


def _host(name: str, where: str, need: float, asked: Asked, rule: str) -> Iterator[Finding]:
    about = f"{where}: about {need / GB:.1f} GB"
    wanted = asked.of(rule).number("mem_mb")
    if asked.profile is not None and shutil.which("sbatch") and not inside_a_job():
        set_it = f"in the profile: set-resources: {{{rule}: {{mem_mb: {_round(need)}}}}}"
        if wanted is None:
            yield Finding(name, WARNING, f"{about}, rule {rule} asks for no mem_mb", set_it)
        elif need > wanted * MIB:
            grade = _grade(need, wanted * MIB)
            yield Finding(name, grade, f"{about}, rule {rule} asks for {wanted * MIB / GB:.1f} GB", set_it)
        else:
            yield Finding(name, OK, f"{about}, rule {rule} asks for {wanted * MIB / GB:.1f} GB")
        return
    if inside_a_job():
        return
    there = float(psutil.virtual_memory().total)
    if need > there:
        fix = "run it where there is more memory, or raise train.accumulate, set train.lora, or more store.shards"
        yield Finding(name, _grade(need, there), f"{about}, this machine has {there / GB:.1f} GB", fix)
    else:
        yield Finding(name, OK, f"{about}, this machine has {there / GB:.1f} GB")


def _grade(need: float, room: float) -> str:
    """An estimate is off by a fifth at times: only what is clearly too large would fail."""
    return FAIL if need > 1.2 * room else WARNING


def _round(need: float) -> int:
    """MB with a quarter to spare, in whole GB."""
    return math.ceil(1.25 * need / GB) * 1000


def _gpu(name: str, where: str, need: float, fix: str, paths: Paths, asked: Asked, rule: str) -> Iterator[Finding]:
    room = gpu_memory(paths)
    if room is None:
        if rule == "train" and asked.of(rule).gpus and shutil.which("sbatch"):
            unknown = f"{where}: about {need / GB:.1f} GB; the GPUs' memory is not known yet"
            yield Finding(name, OK, unknown, "kvpipe doctor --probe looks into a job")
        return
    about = f"{where}: about {need / GB:.1f} GB, a GPU has {room / GB:.1f} GB"
    if need > 0.95 * room:
        yield Finding(name, _grade(need, room), about, fix)
    else:
        yield Finding(name, OK, about)


def gpu_memory(paths: Paths) -> float | None:
    """Bytes of the GPU that a probe saw, or of this machine's first one."""
    probed = paths.probe
    if probed.is_file():
        seen = json.loads(probed.read_text(encoding="utf-8")).get("gpu") or {}
        if seen.get("memory"):
            return float(seen["memory"])
    answer = ask("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    if answer is None or answer.code:
        return None
    first = answer.out.split()[:1]
    return float(first[0]) * 2**20 if first and first[0].isdigit() else None


def _teachers(work: Workload, paths: Paths, asked: Asked) -> Iterator[Finding]:
    """One finding each on host and GPU, on the store that takes most there."""
    rule = "teacher_kv_shard" if work.config.store.shards > 1 else "teacher_kv"
    unmade = [pair for pair in work.stores if not work.paths.store_index(*pair).is_file()]
    known = {pair: need for pair in unmade if (need := work.pass_bytes(*pair)) is not None}
    if not known:
        return
    pair = max(known, key=known.__getitem__)
    yield from _host("memory of teacher KV", f"the largest, {'/'.join(pair)}", BASE + known[pair], asked, rule)
    # a sharded teacher is on all the GPUs that there are
    whole = [pair for pair in known if not work.loading(pair[0]).sharded]
    if whole and (asked.of(rule).gpus or not shutil.which("sbatch")):
        on_gpu = {pair: float(work.pass_bytes(*pair, on_gpu=True) or 0) for pair in whole}
        pair = max(on_gpu, key=on_gpu.__getitem__)
        where, load = f"the largest, {'/'.join(pair)}", f"models.{pair[0]}.load"
        fix = f"{load}: {{dtype: bf16}} or {{quantize: int8}}, or a lower store.batch_size"
        yield from _gpu("GPU memory of teacher KV", where, on_gpu[pair], fix, paths, asked, rule)

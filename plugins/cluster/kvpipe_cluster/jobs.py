"""The core's checks where the jobs run elsewhere: packages in the image, GPU as a probe saw it, memory as it is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import requires

from packaging.requirements import Requirement

from kvpipe.doctor import FAIL, OK, WARNING, Finding, Workload, gpu, memory, settings
from kvpipe.doctor.memory import Need, compare, compare_gpu, mem_mb, needs
from kvpipe.experiment.files import GB
from kvpipe.experiment.launch import in_job, missing_lines
from kvpipe_cluster.profile import Request, profile_of

LOGIN = {"snakemake", "pydantic", "pyyaml", "typer", "rich", "huggingface_hub", "pyarrow", "safetensors"}
"""Packages of a login node whose jobs run in the image: the others are in there."""
MIB = float(2**20)
NV = "apptainer-args: --nv in the profile"


def on_login_node() -> bool:
    """Whether jobs would be submitted from here."""
    return shutil.which("sbatch") is not None and not in_job()


def check_packages(work: Workload) -> Iterator[Finding]:
    """What the login node needs; the image's own are examined in it, before a run starts."""
    if not on_login_node():
        yield from settings.check_packages(work)
        return
    profile = profile_of(work)
    if profile.containers:
        yield from settings.packages(r for r in settings.requirements() if r.name in LOGIN)
    else:
        yield from settings.check_packages(work)
    if profile.settings.get("executor", "slurm") == "slurm":
        plugin = next(r for r in map(Requirement, requires("kvpipe-cluster") or []) if "executor-plugin" in r.name)
        yield from settings.packages([plugin], "slurm plugin", f'pip install "{plugin}"')


def check_sandbox(work: Workload) -> Iterator[Finding]:
    """Where jobs run in an image, its walls count."""
    for finding in settings.check_sandbox(work):
        in_image = finding.status == FAIL and profile_of(work).containers
        yield replace(finding, status=WARNING) if in_image else finding


# ---------------------------------------------------------------- GPU
def check_gpu(work: Workload) -> Iterator[Finding]:
    """The GPU that a probe saw in a job, where a cell asks for one."""
    if not on_login_node():
        yield from gpu.check_gpu(work)
        return
    train = profile_of(work).of("train")
    if not train.gpus:
        return
    if lines := missing_lines(train.resources | {"nodes": train.number("nodes")}):
        said = f"a cell on {train.number('nodes')} nodes calls srun itself; Snakemake refuses it without {', '.join(lines)}"
        yield Finding("nodes", FAIL, said, f"in the profile under set-resources, train: {', '.join(lines)}")
    if not work.paths.probe.is_file():
        yield Finding("GPU", OK, "no job has looked for one yet", "kvpipe doctor --probe")
        return
    seen = json.loads(work.paths.probe.read_text(encoding="utf-8"))
    found, where = seen.get("gpu"), f"in job {seen.get('job')}"
    # `device: auto` trains all the same, on the CPU
    status = FAIL if work.config.train.device.startswith("cuda") else WARNING
    if found is None:
        fix = f"{NV}; nvidia-smi in a job outside the image must show the GPU"
        yield Finding("GPU", status, f"none was seen {where}", fix)
        return
    for finding in gpu.judge_gpu(found, work.config, where):
        if finding.name == "GPU" and finding.status == OK and found.get("available") is False:
            fix = f"{NV}; is CUDA_VISIBLE_DEVICES empty in the job?"
            yield Finding("GPU", status, f"{finding.detail}, but torch sees no GPU", fix)
        else:
            yield finding


# ---------------------------------------------------------------- memory
def check_memory(work: Workload) -> Iterator[Finding]:
    """What the steps take against what their rules ask for, and against the GPU that a probe saw."""
    if not on_login_node():
        yield from memory.check_memory(work)
        return
    profile, room = profile_of(work), gpu_memory(work)
    for need in needs(work, lambda rule: profile.of(rule).gpus):
        request = profile.of(need.rule)
        yield _host(need, request)
        if need.gpu is None or not request.gpus:
            continue
        if room is not None:
            yield compare_gpu(need, room)
        elif need.rule == "train":
            said = f"{need.about}: about {need.gpu / GB:.1f} GB; the GPUs' memory is not known yet"
            yield Finding(f"GPU memory of {need.name}", OK, said, "kvpipe doctor --probe looks into a job")


def _host(need: Need, request: Request) -> Finding:
    name, about = f"memory of {need.name}", f"{need.about}: about {need.host / GB:.1f} GB, rule {need.rule} asks for"
    fix = f"in the profile: set-resources: {{{need.rule}: {{mem_mb: {mem_mb(need)}}}}}"
    wanted = request.number("mem_mb")
    if wanted is None:
        return Finding(name, WARNING, f"{about} no mem_mb", fix)
    return compare(name, f"{about} {wanted * MIB / GB:.1f} GB", need.host, wanted * MIB, fix)


def gpu_memory(work: Workload) -> float | None:
    """Bytes of the GPU that a probe saw."""
    if not work.paths.probe.is_file():
        return None
    seen = json.loads(work.paths.probe.read_text(encoding="utf-8")).get("gpu") or {}
    return float(seen["memory"]) if seen.get("memory") else None

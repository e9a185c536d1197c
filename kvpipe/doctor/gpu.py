"""Whether the GPU, its driver, torch's CUDA and the precision go together: here, or as a probe saw it in a job."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpipe.config import Config
from kvpipe.doctor.asked import Asked
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding, inside_a_job
from kvpipe.doctor.look import nvidia
from kvpipe.experiment import launch
from kvpipe.experiment.paths import Paths

DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA's major version → the least NVIDIA driver that runs it (minor versions are compatible)."""
OLDER = "VARIANT=cu126 TORCH_INDEX=<torch's index for CUDA 12.6> make image"
"""The image with a torch for CUDA 12, under a name of its own: that of the first would be up to date."""
BF16 = (8, 0)
"""Compute capability from which a GPU computes bf16 itself."""


def examine_gpu(config: Config, paths: Paths, asked: Asked) -> list[Finding]:
    """Findings on GPUs; none where none is asked for."""
    if inside_a_job():
        return []
    on_cluster = shutil.which("sbatch") is not None
    probed = paths.probe
    if on_cluster:
        if not asked.of("train").gpus:
            return []
        if not probed.is_file():
            return [*_nodes(asked), Finding("GPU", OK, "no job has looked for one yet", "kvpipe doctor --probe")]
        seen = json.loads(probed.read_text(encoding="utf-8"))
        return [*_nodes(asked), *judge(seen.get("gpu"), config, f"in job {seen.get('job')}")]
    seen = seen_here()
    if seen is None:
        if config.train.device.startswith("cuda"):
            fix = "train.device: auto (or cpu); on a cluster the jobs have the GPU, not the login node"
            return [Finding("GPU", FAIL, f"train.device is {config.train.device}, nvidia-smi shows no GPU here", fix)]
        return []
    return [*judge(seen, config, "on this machine")]


def _nodes(asked: Asked) -> Iterator[Finding]:
    request = asked.of("train")
    lines = launch.lacking(request.resources | {"nodes": request.number("nodes")})
    if lines:
        detail = f"a cell on {request.number('nodes')} nodes calls srun itself; Snakemake refuses it without {', '.join(lines)}"
        yield Finding("nodes", FAIL, detail, f"in the profile under set-resources, train: {', '.join(lines)}")


def seen_here() -> dict[str, Any] | None:
    """The first GPU by nvidia-smi, and the installed torch's CUDA; None without a GPU."""
    gpu = nvidia()
    return None if gpu is None else {**gpu, "torch_cuda": torch_cuda()}


def torch_cuda() -> str | None:
    """CUDA version that the installed torch was built for, without importing it; None for a CPU build or no torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).with_name("version.py")
    found = re.search(r"^cuda.*=\s*'([\d.]+)'", file.read_text("utf-8"), flags=re.MULTILINE) if file.is_file() else None
    return found[1] if found else None


def judge(seen: dict[str, Any] | None, config: Config, where: str) -> Iterator[Finding]:
    """Findings on one GPU, as `seen_here` or a probe describes it."""
    if seen is None:
        fix = "apptainer-args: --nv in the profile; nvidia-smi in a job outside the image must show the GPU"
        yield Finding("GPU", FAIL, f"none was seen {where}", fix)
        return
    cuda = seen.get("torch_cuda")
    shown = f"{seen['name']} {where}, driver {seen['driver']}, torch for CUDA {cuda or '(none)'}"
    least = DRIVERS.get(int(cuda.split(".")[0]), 0) if cuda else 0
    if cuda is None:
        fix = "VARIANT=cuda make image, or install a CUDA build of torch"
        yield Finding("GPU", FAIL, f"{shown}: it would train on the CPU", fix)
    elif _major(seen["driver"]) < least:
        fix = f"ask for nodes with driver {least} or later"
        if _major(seen["driver"]) >= DRIVERS[12] and least > DRIVERS[12]:
            fix += f", or an image for CUDA 12: {OLDER}"
        yield Finding("GPU", FAIL, f"{shown}, which needs driver {least}", fix)
    elif seen.get("available") is False:
        fix = "apptainer-args: --nv in the profile; is CUDA_VISIBLE_DEVICES empty in the job?"
        yield Finding("GPU", FAIL, f"{shown}, but torch sees no GPU", fix)
    else:
        yield Finding("GPU", OK, shown)
    if config.train.precision == "bf16" and _capability(seen["capability"]) < BF16:
        detail = f"{seen['name']} (compute capability {seen['capability']}) computes no bf16: torch emulates it, slowly"
        yield Finding("precision", WARNING, detail, "train.precision: fp16")


def _major(version: str) -> int:
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0


def _capability(text: str | None) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text or "")) or BF16

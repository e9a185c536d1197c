"""Whether a GPU, its driver, torch's CUDA and the precision go together."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvpipe.config import Config
from kvpipe.doctor.finding import FAIL, OK, WARNING, Finding
from kvpipe.doctor.look import nvidia
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.launch import in_job

DRIVERS = {11: 450, 12: 525, 13: 580}
"""CUDA's major version → the least NVIDIA driver that runs it (minor versions are compatible)."""
OLDER = "VARIANT=cu126 TORCH_INDEX=<torch's index for CUDA 12.6> make image"
"""The image with a torch for CUDA 12, under a name of its own: that of the first would be up to date."""
BF16 = [8, 0]
"""Compute capability from which a GPU computes bf16 itself."""


def check_gpu(work: Workload) -> Iterator[Finding]:
    """Findings on this machine's first GPU; none where there is none and none is named."""
    device, seen = work.config.train.device, None if in_job() else nvidia()
    if seen is not None:
        yield from judge_gpu(seen | {"torch_cuda": torch_cuda()}, work.config, "on this machine")
    elif device.startswith("cuda") and not in_job():
        fix = "train.device: auto (or cpu); on a cluster the jobs have the GPU, not the login node"
        yield Finding("GPU", FAIL, f"train.device is {device}, nvidia-smi shows no GPU here", fix)


def torch_cuda() -> str | None:
    """CUDA version that the installed torch was built for, without importing it; None for a CPU build or no torch."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    text = file.read_text("utf-8") if file is not None and file.is_file() else ""
    found = re.search(r"^cuda.*=\s*'([\d.]+)'", text, flags=re.MULTILINE)
    return found[1] if found else None


def judge_gpu(seen: dict[str, Any], config: Config, where: str) -> Iterator[Finding]:
    """Findings on one GPU, as `kvpipe.doctor.look` describes it."""
    cuda, (driver, *_) = seen.get("torch_cuda"), [*_numbers(seen["driver"]), 0]
    shown = f"{seen['name']} {where}, driver {seen['driver']}, torch for CUDA {cuda or '(none)'}"
    least = DRIVERS.get(_numbers(cuda)[0], 0) if cuda else 0
    # `device: auto` trains all the same, on the CPU
    status = FAIL if config.train.device.startswith("cuda") else WARNING
    if cuda is None:
        fix = "VARIANT=cuda make image, or install a CUDA build of torch"
        yield Finding("GPU", status, f"{shown}: it would train on the CPU", fix)
    elif driver < least:
        fix = f"ask for nodes with driver {least} or later"
        fix += f", or an image for CUDA 12: {OLDER}" if driver >= DRIVERS[12] and least > DRIVERS[12] else ""
        yield Finding("GPU", status, f"{shown}, which needs driver {least}", fix)
    else:
        yield Finding("GPU", OK, shown)
    if config.train.precision == "bf16" and (_numbers(seen["capability"]) or BF16) < BF16:
        detail = f"{seen['name']} (compute capability {seen['capability']}) computes no bf16: torch emulates it, slowly"
        yield Finding("precision", WARNING, detail, "train.precision: fp16")


def _numbers(text: str | None) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text or "")]

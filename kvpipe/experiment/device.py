"""Resolve `train.device`, fail if it is unavailable, and join the processes of one training."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from datetime import timedelta
from functools import cache

import torch

from kvpipe.config import ConfigError
from kvpipe.experiment import launch
from kvpipe.experiment.sizes import cpu_has_bf16

HARMLESS = {"ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"}
"""Variables of accelerate that change no number."""
JOB_GPUS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
"""Set where a job has GPUs: their numbers, and last how many. Snakemake's job step takes the job's own away."""

RETAINED = 256 << 20
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Options of `mallopt`, as malloc.h numbers them."""


class NoDevice(RuntimeError):
    """A GPU was asked for and torch sees none."""


def resolve_device(setting: str) -> str:
    """`train.device` as a device: `auto` is the accelerator where there is one. On a CPU freed memory is kept for reuse."""
    device = setting if setting != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()
    return device


@cache
def keep_freed_memory() -> bool:
    """Have glibc keep tensors of up to `RETAINED` bytes when they are freed; whether it took that.

    By default each tensor over 32 MB is given back to the system and its pages zeroed anew at the next step: a quarter of a
    training step's processor time with 49,152 words. What the user set by GLIBC_TUNABLES or LD_PRELOAD stays.
    """
    if any("malloc" in os.environ.get(name, "") for name in ("GLIBC_TUNABLES", "LD_PRELOAD")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is None:
        return False
    # an older glibc takes no threshold over 32 MB
    return bool(mallopt(M_MMAP_THRESHOLD, RETAINED) or mallopt(M_MMAP_THRESHOLD, 32 << 20)) and bool(
        mallopt(M_TRIM_THRESHOLD, 2 * RETAINED) and mallopt(M_TOP_PAD, RETAINED // 4)
    )


def check_device(device: str, log=print) -> None:
    """Refuse a named GPU that is not there; log a job's GPUs that torch does not see.

    Raises:
        NoDevice: `device` is `cuda…` and torch sees no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        if number >= count:
            raise NoDevice(f"train.device is {device}, but torch {torch.__version__} sees {count} GPUs{_reason()}")
        torch.cuda.set_device(number)  # accelerate takes the current one
    elif device == "auto" and count == 0:
        given = [f"{name}={os.environ[name]}" for name in JOB_GPUS if os.environ.get(name)]
        if given and given[0] != "SLURM_GPUS_ON_NODE=0":
            log(f"this job has GPUs ({given[0]}), but torch sees none and trains on the CPU{_reason()}")


def resolve_precision(setting: str, device: str) -> str:
    """`train.precision` on a resolved device: `auto` is bf16 where it computes in that, and not by way of fp32."""
    if setting != "auto":
        return setting
    native = cpu_has_bf16() if device == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"


def check_precision(precision: str, device: str) -> None:
    """Refuse fp16 on a CPU, where accelerate would compute in fp32.

    Raises:
        ConfigError: with what to set instead.
    """
    if precision == "fp16" and device == "cpu":
        raise ConfigError(
            "train.precision is fp16, which nothing computes on a CPU: set train.precision: fp32 or bf16, or train.device: cuda"
        )


def without_environment() -> None:
    """Take from the environment what accelerate would put above the configuration (`ACCELERATE_…`).

    Gradient accumulation, mixed precision and compilation are the configuration's alone, so their variables go. A
    launcher that shards the model was meant to, and is refused.

    Raises:
        ConfigError: FSDP, DeepSpeed, Megatron or another parallelism is asked for; names the variable.
    """
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") and name not in HARMLESS]:
        value = os.environ.pop(name)
        if name.startswith("ACCELERATE_USE_") and value.lower() not in ("", "0", "false", "no", "off"):
            raise ConfigError(
                f"{name}={value} in the environment asks for a way of training that kvpipe does not have: every process "
                "holds the whole student. Unset it, or start with `accelerate launch --multi_gpu`"
            )


def meet(device: str) -> None:
    """Join the processes that the launcher's variables speak of, for at most `KVPIPE_MEETING_SECONDS` (60).

    Only the meeting is limited: a collective waits as long as torch lets it, since one process may build what all need.

    Raises:
        ConfigError: the others did not come; says what is in the environment and what to do.
    """
    launch.check_environment(os.environ)
    if os.environ.get("WORLD_SIZE", "1") in ("", "1") or torch.distributed.is_initialized():
        return
    limit = float(os.environ.get("KVPIPE_MEETING_SECONDS", "60"))
    try:
        if os.environ["RANK"] != "0":
            _reach(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), limit)
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=limit)))
        # torch's store does not wait for ranks of which it heard nothing
        store.set(f"kvpipe/{rank}", "")
        store.wait([f"kvpipe/{other}" for other in range(size)], timedelta(seconds=limit))
    except (OSError, RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(
            launch.stray_variables(os.environ, f"not all of them came within {limit:g} s ({said})")
        ) from error
    store.set_timeout(torch.distributed.constants.default_pg_timeout)
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


def _reach(host: str, port: int, limit: float) -> None:
    """Wait until the first process listens; torch would fill the terminal with frames of its C++ meanwhile."""
    end = time.monotonic() + limit
    while True:
        try:
            socket.create_connection((host, port), timeout=limit).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


def _reason() -> str:
    if torch.version.cuda is None:
        return ": it is a CPU build; install a CUDA build, or build the image with VARIANT=cuda"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ": CUDA_VISIBLE_DEVICES is empty; ask for a GPU (gpu: 1 in the profile)"
    return (
        f" (built for CUDA {torch.version.cuda}): on a login node there is none; in a job, start the image with --nv, "
        "and compare the driver that nvidia-smi shows; kvpipe doctor --probe looks there. Or set train.device: auto"
    )

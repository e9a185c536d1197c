"""The device that was asked for is the device that is used, or it is said."""

from __future__ import annotations

import os

import torch

from kvpipe.config import ConfigError

HARMLESS = {"ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE"}
"""What the environment may say to accelerate: nothing of it changes a number."""


class NoDevice(RuntimeError):
    """A GPU was asked for and torch sees none."""


def resolve_device(setting: str) -> str:
    """`train.device` as a device: `auto` is the accelerator where there is one."""
    if setting != "auto":
        return setting
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str, log=print) -> None:
    """Refuse a named GPU that is not there; say so where a job was given one that torch does not see.

    Raises:
        NoDevice: `device` is `cuda…` and torch sees no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        if number >= count:
            raise NoDevice(f"train.device is {device}, but torch {torch.__version__} sees {count} GPUs{_reason()}")
        torch.cuda.set_device(number)  # accelerate takes the current one
    elif device == "auto" and count == 0 and os.environ.get("SLURM_JOB_GPUS"):
        log(f"this job has GPU {os.environ['SLURM_JOB_GPUS']}, but torch sees none and trains on the CPU{_reason()}")


def check_precision(precision: str, device: str) -> None:
    """Refuse fp16 on a CPU, where accelerate would compute in fp32 and say nothing.

    Raises:
        ConfigError: with what to set instead.
    """
    if precision == "fp16" and device == "cpu":
        raise ConfigError(
            "train.precision is fp16, which nothing computes on a CPU: set train.precision: fp32 (or bf16), "
            "or train on a GPU (train.device: cuda)"
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


def _reason() -> str:
    if torch.version.cuda is None:
        return ": it is a CPU build; install a CUDA build, or build the image with VARIANT=cuda"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ": CUDA_VISIBLE_DEVICES is empty; ask for a GPU (gpu: 1 in the profile)"
    return (
        f" (built for CUDA {torch.version.cuda}): on a login node there is none; in a job, start the image with --nv, "
        "and compare the driver that nvidia-smi shows; kvpipe doctor --probe looks there. Or set train.device: auto"
    )

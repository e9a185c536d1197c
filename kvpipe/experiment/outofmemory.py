"""An out-of-memory error that says which setting to lower, and to what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvpipe.config import EvaluateConfig, StoreConfig, TrainConfig

SIGNS = ("out of memory", "can't allocate memory", "Cannot allocate memory")
"""Words of the errors that are no `torch.OutOfMemoryError`: the CPU allocator's and the libraries'."""


class OutOfMemory(RuntimeError):
    """Memory ran out; the message names the setting to change."""


@contextmanager
def explained(doing: str, advice: str) -> Iterator[None]:
    """Tell memory errors of the block with what to do about them.

    Raises:
        OutOfMemory: memory of the GPU or of the host ran out inside.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(sign in told for sign in SIGNS):
            raise
        raise OutOfMemory(f"out of memory while {doing}. {advice} ({told})") from error


def training_advice(config: TrainConfig, processes: int) -> str:
    """The next step of: smaller micro-batches, checkpointing, half precision, adapters; all that is left, in order."""
    micro = math.ceil(config.batch_size / config.accumulate / processes)
    steps = []
    if micro > 1:
        wanted = math.ceil(config.batch_size / processes / (micro // 2))
        smaller = math.ceil(config.batch_size / wanted / processes)
        steps.append(
            f"train.accumulate: {wanted} (now {config.accumulate}: {smaller} instead of {micro} texts at once, the same batch)"
        )
    if not config.gradient_checkpointing:
        steps.append("train.gradient_checkpointing: true")
    if config.precision == "fp32":
        steps.append("train.precision: bf16")
    if config.lora is None:
        steps.append("train.lora: {}")
    if not steps:
        return f"Lower train.max_length (now {config.max_length}) by taking out the longest texts, or use a larger GPU"
    more = f"; if that is not enough, also {', '.join(steps[1:])}" if steps[1:] else ""
    return f"Set {steps[0]}{more}"


def batch_advice(setting: str, size: int) -> str:
    """Half the batch, while there is one."""
    if size > 1:
        return f"Set {setting}: {size // 2} (now {size}); results do not depend on it"
    return f"{setting} is 1 already: ask for more memory (mem_mb, or a larger GPU)"


def evaluation_advice(config: EvaluateConfig) -> str:
    """For scoring and generation."""
    return batch_advice("evaluate.batch_size", config.batch_size)


def teacher_advice(config: StoreConfig) -> str:
    """For forwards of a teacher; a shard's rows are held until it is written."""
    return f"{batch_advice('store.batch_size', config.batch_size)}, or store.shards: {2 * config.shards}"

"""Out-of-memory errors that say which setting to lower, and to what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvpipe.config import EvaluateConfig, StoreConfig, TrainConfig

MESSAGES = ("out of memory", "can't allocate memory", "Cannot allocate memory")
"""Parts of the messages of other errors: the CPU allocator's and the libraries'."""


class OutOfMemory(RuntimeError):
    """Memory ran out; the message names the setting to change."""


@contextmanager
def explained(doing: str, config: TrainConfig | EvaluateConfig | StoreConfig, processes: int = 1) -> Iterator[None]:
    """Raise out-of-memory errors of the block again, with advice.

    Args:
        doing: what the block does.
        config: the settings that decide its memory.
        processes: of the training, each with a part of the batch.

    Raises:
        OutOfMemory: memory of the GPU or of the host ran out inside.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(part in said for part in MESSAGES):
            raise
        raise OutOfMemory(f"out of memory while {doing}. {advice(config, processes)} ({said})") from error


def advice(config: TrainConfig | EvaluateConfig | StoreConfig, processes: int = 1) -> str:
    """What to set next; for training all that is left, in order: micro-batches, checkpointing, precision, adapters."""
    if isinstance(config, TrainConfig):
        micro = math.ceil(config.batch_size / config.accumulate / processes)
        steps = []
        if micro > 1:
            more = math.ceil(config.batch_size / processes / (micro // 2))
            fewer = math.ceil(config.batch_size / more / processes)
            texts = f"{fewer} instead of {micro} texts at once, the same batch"
            steps.append(f"train.accumulate: {more} (now {config.accumulate}: {texts})")
        steps += [] if config.gradient_checkpointing else ["train.gradient_checkpointing: true"]
        steps += ["train.precision: bf16"] if config.precision == "fp32" else []
        steps += ["train.lora: {}"] if config.lora is None else []
        if steps:
            return f"Set {'; if that is not enough, also '.join(filter(None, (steps[0], ', '.join(steps[1:]))))}"
        return f"Lower train.max_length (now {config.max_length}) by taking out the longest texts, or use a larger GPU"
    section, size = "store" if isinstance(config, StoreConfig) else "evaluate", config.batch_size
    smaller = f"Set {section}.batch_size: {size // 2} (now {size}); results do not depend on it"
    said = smaller if size > 1 else f"{section}.batch_size is 1: ask for more memory (mem_mb, or a larger GPU)"
    return f"{said}, or store.shards: {2 * config.shards}" if isinstance(config, StoreConfig) else said

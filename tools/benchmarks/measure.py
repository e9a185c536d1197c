"""What every benchmark shares: a line of the table, and processor time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvpipe.train.trainer import peak_memory


@dataclass(frozen=True)
class Row:
    """One line of the table; `met` is None where there is no bar."""

    what: str
    measured: str
    bar: str = "–"
    met: bool | None = None


def spent(function: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def median(function: Callable[[], object], repeats: int) -> float:
    """Median processor seconds."""
    return statistics.median(spent(function) for _ in range(repeats))


def high_water() -> int:
    """Peak resident bytes of this process since it began, or since /proc/self/clear_refs was written."""
    return peak_memory(torch.device("cpu"))

"""What every benchmark shares: a line of the table, and processor time."""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import AcceleratorState

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


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result, as JSON has it, of a call in a process that is forked for it: a fresh heap, and nothing imported again.

    Raises:
        RuntimeError: the call ended with an error, which is printed, or was killed.
    """
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            # what the parent trained, in whatever precision, holds for nothing here
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(torch.get_num_threads())  # before threads, which would find the pool half replaced
            os.close(read)
            with os.fdopen(write, "w") as out:
                json.dump(function(*arguments), out)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError(f"{function.__name__} {arguments} ended with an error, which stands above, or was killed")
    return json.loads(text)

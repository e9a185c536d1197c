"""Regular expressions: those of the configuration, within a limit of processor time, and what nobody sees of a text."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

UNSEEN = "[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
"""Soft hyphens, joiners, marks of direction: nothing that a reader sees."""
LIMIT_SECONDS = 10.0
"""Processor time for one expression on one text; what is meant to match takes milliseconds."""


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """End what runs inside after `LIMIT_SECONDS`, in the main thread; `re` looks for signals while it searches.

    Args:
        what: the expression, as the error names it.

    Raises:
        ValueError: it took longer.
    """
    with processor_time(
        LIMIT_SECONDS,
        ValueError(
            f"{what} has found no end within {LIMIT_SECONDS:g} s: it tries exponentially many ways, as (a+)+ does; write it "
            "without a repetition inside a repetition"
        ),
    ):
        yield


@contextmanager
def processor_time(seconds: float, error: BaseException) -> Iterator[None]:
    """Raise `error` in what runs inside, in the main thread, whenever it has computed for `seconds`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

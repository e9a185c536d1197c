"""How far a step has come: a bar on a terminal, plain lines in a log, nothing where it is over within seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress as Display

INTERVAL = 10.0
"""Seconds between two lines in a log."""
T = TypeVar("T")
_display: Display | None = None
"""The bars of this process: what begins inside another step gets a bar below it."""


class Progress:
    """One bar, or its lines.

    Args:
        label: what is done.
        total: how many there are.
        unit: of what, in the plural.
        done: how many were done before.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0):
        self.label, self.total, self.unit, self.done, self._before = label, total, unit, done, done
        self._begun = self._said = time.monotonic()
        self._silent = os.environ.get("RANK", "0") not in ("", "0")  # another process of the group shows the same
        self._bar = None
        if not self._silent and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = _shown().add_task(label, total=total, completed=done, unit=unit, note="")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None and _display is not None:
            _display.remove_task(self._bar)
            if not _display.tasks:
                stop()

    def add(self, count: int = 1, note: str = "") -> None:
        """So many more are done; `note` is what they came to, such as a loss."""
        self.done += count
        now = time.monotonic()
        if self._bar is not None and _display is not None:
            _display.update(self._bar, completed=self.done, note=note)
        elif not self._silent and (
            now - self._said >= INTERVAL or (self.done == self.total and self._said > self._begun)
        ):
            self._said, rate = now, (self.done - self._before) / max(now - self._begun, 1e-9)
            parts = [
                f"{self.label}: {self.done:,} of {self.total:,} {self.unit}",
                f"{_short(rate)} {self.unit}/s",
                note,
            ]
            parts.append(f"{(self.total - self.done) / max(rate, 1e-9):,.0f} s left")
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def track(items: Collection[T], label: str, unit: str, size: Callable[[T], int] = lambda _: 1) -> Iterator[T]:
    """The items, each counted once the next one is asked for.

    Args:
        items: what is gone through.
        label: what is done with them.
        unit: what is counted, in the plural.
        size: how many of these an item has.
    """
    with Progress(label, sum(map(size, items)), unit) as progress:
        for item in items:
            yield item
            progress.add(size(item))


def stop() -> None:
    """Take the bars off the terminal: before an error's message, and at the end."""
    global _display
    if _display is not None:
        _display.stop()
        _display = None


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _shown() -> Display:
    """The display, begun if it is not there. Lines that are printed meanwhile stand above the bars."""
    global _display
    if _display is None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Display
        from rich.text import Text

        class Rate(ProgressColumn):
            """Units a second."""

            def render(self, task: Task) -> Text:
                return Text(f"{_short(task.speed)} {task.fields['unit']}/s" if task.speed else "")

        texts = ("{task.description}", "{task.completed:,.0f}/{task.total:,.0f}", "{task.fields[note]}")
        label, count, note = (TextColumn(text, markup=False) for text in texts)
        _display = Display(
            label,
            BarColumn(bar_width=24),
            count,
            Rate(),
            note,
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        _display.start()
    return _display

"""A report as a picture, by headless Chromium: `python tools/screenshot.py results/report.html docs/report.png`.

Needs playwright (`make test-browser` installs it) and a Chromium: `apt-get install -y chromium`, or CHROMIUM=path.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 600_000
"""Milliseconds: a loaded machine is slow, and no test of the page is one of speed."""


def chromium() -> str | None:
    """The program, where there is one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium.

    Raises:
        FileNotFoundError: there is none.
    """
    from playwright.sync_api import sync_playwright

    if (program := chromium()) is None:
        raise FileNotFoundError(
            "no Chromium is on the PATH: apt-get install -y chromium, or set CHROMIUM to its program"
        )
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=PATIENCE)
        yield started
        started.close()


def opened(started: Any, page: Path, width: int, dark: bool = False, height: int = 900) -> Any:
    """A page in a window of this size."""
    size = {"width": width, "height": height}
    tab = started.new_page(viewport=size, color_scheme="dark" if dark else "light", reduced_motion="reduce")
    tab.set_default_timeout(PATIENCE)
    tab.goto(page.resolve().as_uri())
    return tab


def main(page: str, out: str, width: int = 1440, height: int = 1000) -> None:
    """The first screen."""
    with browser() as started:
        opened(started, Path(page), width, height=height).screenshot(path=out)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))

"""The HTML files of this folder, filled in: every page is one self-contained file in one style."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvpipe import __version__
from kvpipe.report import style


def filled(template: str, content: dict[str, Any]) -> str:
    """A page, all text in it escaped.

    Args:
        template: its file in this folder.
        content: what it shows beside version and colours; a name that is missing is an error.
    """
    environment = Environment(
        loader=PackageLoader("kvpipe.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = {"version": __version__, "colours": {"light": style.LIGHT, "dark": style.DARK}}
    return environment.get_template(template).render(shared | content)

"""Data step: the splits."""

from __future__ import annotations

from kvpipe.data.build import build
from kvpipe.steps.make import Work


def make_data(inputs: Work) -> None:
    """The splits."""
    build(inputs.config.data, inputs.paths.data("train").parent)

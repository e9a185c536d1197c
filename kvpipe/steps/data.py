"""Data step: the splits."""

from __future__ import annotations

from kvpipe.data.build import build
from kvpipe.steps.inputs import Inputs


def make_data(inputs: Inputs) -> None:
    """The splits."""
    build(inputs.config.data, inputs.paths.data("train").parent)

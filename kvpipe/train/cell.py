"""One cell, an arm under a seed: all that its training reads, finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from kvpipe.config import Arm, EvaluateConfig, TrainConfig
from kvpipe.data.encoding import Encoding
from kvpipe.distill.objective import Objective


@dataclass
class Cell:
    """What one training run is given."""

    name: str
    """Of the arm."""
    arm: Arm
    drawn: int
    """The seed of weights, order and dropout: the cell's, moved by the arm's `seed_offset`."""
    config: TrainConfig
    """With the arm's own number of steps."""
    scoring: EvaluateConfig
    student: nn.Module
    """Before training; it is trained in place."""
    objective: Objective
    """The terms of the arm's loss."""
    train: Encoding
    validation: Encoding
    pad_id: int
    examples: np.ndarray
    """Numbers of the training examples that it sees."""
    made_from: dict[str, Any]
    """What must agree when a checkpoint is continued, as JSON."""


def budget(config: TrainConfig, arm: Arm) -> TrainConfig:
    """Training of an arm's cells: the same for every arm, but for the steps where an arm says so."""
    return config.model_copy(update={"steps": max(1, round(config.steps * arm.step_factor))})

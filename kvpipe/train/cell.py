"""One cell, an arm under a seed: all that its training reads, finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from kvpipe.config import Arm, ConfigError, EvaluateConfig, TrainConfig
from kvpipe.data.encoding import Encoding
from kvpipe.distill.objective import Objective
from kvpipe.train.online import OnPolicy


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
    seed: int
    """Of the cell, whatever it draws by."""
    trackers: Path
    """Folder of what `train.report_to` writes."""
    online: OnPolicy | None = None
    """What the student writes itself, where the arm asks for it."""


def budget(config: TrainConfig, arm: Arm) -> TrainConfig:
    """Training of an arm's cells: the same for every arm, but for steps and learning rate where an arm says so."""
    steps, rate = max(1, round(config.steps * arm.step_factor)), config.learning_rate * arm.learning_rate_factor
    return config.model_copy(update={"steps": steps, "learning_rate": rate})


def freeze(student: nn.Module, names: list[str]) -> None:
    """Leave the weights whose names hold one of `names` untrained.

    Raises:
        ConfigError: a name is in none, or nothing is left to train.
    """
    weights = dict(student.named_parameters())
    for name in names:
        found = [weight for path, weight in weights.items() if name in path]
        if not found:
            raise ConfigError(
                f"train.frozen: no weight of the student has {name!r} in its name; it has {', '.join(weights)}"
            )
        for weight in found:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in weights.values()):
        raise ConfigError(f"train.frozen: {', '.join(names)} leaves nothing of the student to train; name less")

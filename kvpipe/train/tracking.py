"""What a cell measures, for the trackers that accelerate knows: TensorBoard, and others by name where they are installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpipe.config import ConfigError
from kvpipe.config.errors import nearest

if TYPE_CHECKING:
    from accelerate import Accelerator

PROJECT = "kvpipe"
"""Where a tracker has projects."""


def check_trackers(names: list[str]) -> None:
    """Refuse trackers that accelerate does not know, or that are not installed.

    Raises:
        ConfigError: names them.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = set(map(str, get_available_trackers()))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"train.report_to: unknown {name!r}{nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            fix = 'pip install "kvpipe[tensorboard]"' if name == "tensorboard" else f"pip install {name}"
            raise ConfigError(f"train.report_to: {name} is not installed: {fix}, or leave it out")


def begin(accelerator: Accelerator, names: list[str], folder: Path, arm: str, seed: int, step: int) -> None:
    """Begin one run for the cell with each tracker, grouped by arm; `Accelerator.log` then reaches them all.

    Args:
        accelerator: of the training loop.
        names: of the trackers.
        folder: where trackers that keep files put them: TensorBoard in `<arm>/seed<k>`.
        arm: of the cell.
        seed: of the cell.
        step: steps that are done; what a run that was stopped said of later ones is dropped.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    trackers = []
    for name in names:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            trackers.append(kind(f"{arm}/seed{seed}", folder, purge_step=step))
        elif kind.requires_logging_directory:
            trackers.append(kind(PROJECT, folder / name / arm / f"seed{seed}"))
        else:
            trackers.append(kind(PROJECT, **({"group": arm, "name": f"{arm}-seed{seed}"} if name == "wandb" else {})))
    accelerator.log_with = trackers
    accelerator.init_trackers(PROJECT)

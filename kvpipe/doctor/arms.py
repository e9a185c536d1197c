"""Whether the models have what the arms ask of them: layers by their numbers, next tokens, relation heads."""

from __future__ import annotations

from collections.abc import Iterator

from kvpipe.config import Config
from kvpipe.doctor.finding import FAIL, OK, Finding
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.misfits import misfits
from kvpipe.experiment.paths import Paths
from kvpipe.models.headers import lora_misfit


def examine_arms(config: Config, paths: Paths) -> list[Finding]:
    """One finding per setting that does not fit a model whose config.json is on this machine."""
    work = Workload(config, paths)
    shapes = {name: shape for name in config.models if (shape := work.shape(name)) is not None}
    found = [*misfits(work.dag, shapes), *_adapters(work)]
    if not found:
        return [Finding("arms", OK, f"{len(work.dag.arms)} arms fit the shapes of {len(shapes)} models")]
    return [Finding("arms", FAIL, line, "correct this key of the configuration") for line in found]


def _adapters(work: Workload) -> Iterator[str]:
    """Modules that cannot have an adapter, where the student's folder is there."""
    lora, folder = work.config.train.lora, work.folder(work.config.student)
    if lora is not None and folder is not None and lora.target_modules != "all-linear":
        try:
            problem = lora_misfit(folder, list(lora.target_modules))
        except (OSError, ValueError):  # damaged: a finding of its own
            return
        if problem:
            yield f"train.lora.target_modules: {problem}"

"""Whether the models have what the arms ask of them: layers by their numbers, next tokens, relation heads."""

from __future__ import annotations

from kvpipe.config import Config
from kvpipe.doctor.finding import FAIL, OK, Finding
from kvpipe.doctor.workload import Workload
from kvpipe.experiment.misfits import misfits
from kvpipe.experiment.paths import Paths


def examine_arms(config: Config, paths: Paths) -> list[Finding]:
    """One finding per setting that does not fit a model whose config.json is on this machine."""
    work = Workload(config, paths)
    shapes = {name: shape for name in config.models if (shape := work.shape(name)) is not None}
    found = misfits(work.dag, shapes)
    if not found:
        return [Finding("arms", OK, f"{len(work.dag.arms)} arms fit the shapes of {len(shapes)} models")]
    return [Finding("arms", FAIL, line, "correct this key of the configuration") for line in found]

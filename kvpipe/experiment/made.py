"""What every artefact was made from, kept in `made/`: a step whose settings, code and inputs are the same is not run again.

For use without Snakemake, which keeps a record of its own. No torch: the data step runs on a login node too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kvpipe.config import FileData, HubData, LocalModel
from kvpipe.experiment.files import content_digest, write_json
from kvpipe.experiment.paths import MANIFEST, SPLITS, Paths
from kvpipe.experiment.plan import Dag
from kvpipe.experiment.provenance import code_hash

CODE = {
    "data": "kvpipe.data.build",
    "models": "kvpipe.steps.models",
    "layer_map": "kvpipe.steps.layer_map",
    "teacher_kv": "kvpipe.steps.teacher_kv",
    "fit": "kvpipe.steps.fit",
}
"""Step → the module behind it."""


def note(dag: Dag, paths: Paths, step: str, *names: str) -> None:
    """Keep what the artefact that was made just now depends on.

    Args:
        dag: the experiment.
        paths: where its results are.
        step: a key of `CODE`.
        names: the model; the teacher, and for a store the reading; the fit.
    """
    path = _record(paths, step, names)
    write_json(path, _origin(dag, paths, step, names))


def changed(dag: Dag, paths: Paths, step: str, *names: str) -> list[str] | None:
    """What is not as it was when the artefact was made; empty: nothing, None: it is not there, or nobody knows."""
    record = _record(paths, step, names)
    if not (target(paths, step, *names).is_file() and record.is_file()):
        return None
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        now = _origin(dag, paths, step, names)
        return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    except (OSError, ValueError, AttributeError):  # an input is gone, or the record is damaged
        return None


def target(paths: Paths, step: str, *names: str) -> Path:
    """The file that stands for a step's complete artefact."""
    if step == "data":
        return paths.data("train")
    if step == "models":
        return paths.manifest(*names)
    if step == "layer_map":
        return paths.layer_map(*names)
    return paths.store_index(*names) if step == "teacher_kv" else paths.projector(*names)


def _record(paths: Paths, step: str, names: tuple[str, ...]) -> Path:
    return paths.made(target(paths, step, *names))


def _origin(dag: Dag, paths: Paths, step: str, names: tuple[str, ...]) -> dict[str, Any]:
    wildcards = {"models": "model", "teacher_kv": "teacher", "fit": "fit"}
    settings = dag.depends(step, **({wildcards[step]: names[0]} if step in wildcards else {}))
    inputs = {str(path): content_digest(path) for path in _inputs(dag, paths, step, names)}
    return {"settings": json.loads(settings), "code": code_hash(CODE[step]), **inputs}


def _inputs(dag: Dag, paths: Paths, step: str, names: tuple[str, ...]) -> list[Path]:
    """Files that a step reads: earlier artefacts, and for the first steps the user's own."""
    if step == "data":
        return _sources(dag)
    if step == "models":
        model = dag.config.models[names[0]]
        own = sorted(Path(model.path).iterdir()) if isinstance(model, LocalModel) else []
        split = [paths.data("train")] if dag.model_reads_data(names[0]) else []
        like = [paths.manifest(name) for name in dag.model_needs(names[0])]
        return [*like, *split, *(path for path in own if path.is_file() and path.name != MANIFEST)]
    student = [paths.manifest(dag.config.student), paths.data("train")]
    if step == "fit":
        arm = dag.fit_arm(names[0])
        stores = [paths.store_index(t, arm.time.text) for t in arm.teachers] if dag.uses_store(arm) else []
        maps = [paths.layer_map(t) for t in arm.teachers] if dag.needs_layer_map(arm) else []
        return [*student, *(paths.manifest(t) for t in arm.teachers), *stores, *maps]
    teacher = paths.manifest(names[0])
    if step == "layer_map":
        return [teacher, *student, paths.data("validation")]
    return [teacher, *student, *([paths.layer_map(names[0])] if dag.store_needs_layer_map(names[0]) else [])]


def _sources(dag: Dag) -> list[Path]:
    found: set[Path] = set()
    for source in dag.config.data.sources:
        if isinstance(source, FileData):
            named = (getattr(source, split) for split in SPLITS)
            found |= {source.parted(spec)[0] for spec in named if spec is not None}
        elif isinstance(source, HubData) and source.is_folder:
            found |= {path for path in Path(source.repo).rglob("*") if path.is_file()}
    return sorted(found)

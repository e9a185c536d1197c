"""Everything a cell needs, made in order where it is missing or stale: `kvpipe train` without Snakemake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from kvpipe.data import build as data
from kvpipe.distill.build import Workspace
from kvpipe.experiment import made
from kvpipe.steps.fit import make_fit
from kvpipe.steps.layer_map import make_layer_map
from kvpipe.steps.models import make_model
from kvpipe.steps.teacher_kv import make_shard, make_store_index
from kvpipe.train.lora import check_lora


def prepare(work: Workspace, arm_name: str, log=print) -> None:
    """Make what the cells of an arm need and is not there, or was made from something else than now.

    Settings, code and the content of every input are compared, those of the user's own files too.
    """
    for words, step, names, make in _steps(work, arm_name):
        found = made.changed(work.dag, work.paths, step, *names)
        if found is None or found:
            log(f"{words} …" + (f" (again: changed since it was made: {', '.join(found)})" if found else ""))
            make()


def _steps(work: Workspace, arm_name: str) -> Iterator[tuple[str, str, tuple[str, ...], Callable[[], None]]]:
    """Words for people, the step, what it is of, and how it is made; in order."""
    dag, arm = work.dag, work.dag.arm(arm_name)
    yield "data", "data", (), partial(make_data, work)
    for name in dict.fromkeys([work.config.student, *(n for t in arm.teachers for n in (*dag.model_needs(t), t))]):
        yield f"model {name}", "models", (name,), partial(make_model, work, name)
    work.check([arm_name])
    check_lora(work)
    for teacher in arm.teachers:
        if dag.needs_layer_map(arm) or dag.store_needs_layer_map(teacher):
            yield f"layer map of {teacher}", "layer_map", (teacher,), partial(make_layer_map, work, teacher)
    for teacher in arm.teachers if dag.uses_store(arm) else []:
        yield (
            f"KV of {teacher}",
            "teacher_kv",
            (teacher, arm.time.text),
            partial(_store, work, teacher, arm.time.text),
        )
    if dag.needs_fit(arm):
        yield "fit", "fit", (dag.fit_id(arm),), partial(make_fit, work, dag.fit_id(arm))


def make_data(work: Workspace) -> None:
    """The splits."""
    data.build(work.config.data, work.paths.data("train").parent)
    made.note(work.dag, work.paths, "data")


def _store(work: Workspace, teacher: str, reading) -> None:
    for shard in range(work.config.store.shards):
        make_shard(work, teacher, reading, shard)
    make_store_index(work, teacher, reading)

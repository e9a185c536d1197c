"""Everything a cell needs, made in order where it is missing: `kvpipe train` without Snakemake."""

from __future__ import annotations

from kvpipe import data, store
from kvpipe.cell import Workspace
from kvpipe.steps.fit import make_fit
from kvpipe.steps.layer_map import make_layer_map
from kvpipe.steps.models import make_model
from kvpipe.steps.teacher_kv import make_shard, make_store_index


def prepare(work: Workspace, arm_name: str, log=print) -> None:
    """Make what the cells of an arm need and is not there."""
    arm = work.dag.arm(arm_name)
    paths = work.paths
    if not paths.data("train").is_file():
        log("data …")
        data.build(work.config.data, paths.data("train").parent)
    names = [work.config.student, *(n for t in arm.teachers for n in (*work.dag.model_needs(t), t))]
    for name in names:
        if not (paths.model(name) / "MANIFEST.json").is_file():
            log(f"model {name} …")
            make_model(work, name)
    work.check([arm_name])
    for teacher in arm.teachers:
        wanted = work.dag.needs_layer_map(arm) or work.dag.store_needs_layer_map(teacher)
        if wanted and not paths.layer_map(teacher).is_file():
            log(f"layer map of {teacher} …")
            make_layer_map(work, teacher)
    for teacher in arm.teachers if work.dag.uses_store(arm) else []:
        if not (paths.store(teacher, arm.time.text) / store.INDEX).is_file():
            log(f"KV of {teacher} …")
            for shard in range(work.config.store.shards):
                make_shard(work, teacher, arm.time.text, shard)
            make_store_index(work, teacher, arm.time.text)
    if work.dag.needs_fit(arm) and not paths.projector(work.dag.fit_id(arm)).is_file():
        log("fit …")
        make_fit(work, work.dag.fit_id(arm))

"""Teacher-KV step: a teacher's store, part by part."""

from __future__ import annotations

from kvpipe.cache import store
from kvpipe.cache.capture import kv_geometry
from kvpipe.distill.build import Workspace
from kvpipe.experiment import made
from kvpipe.experiment.outofmemory import explained


def make_shard(work: Workspace, teacher: str, reading, shard: int) -> None:
    """One shard of a teacher's store."""
    config = work.config.store
    work.check(work.dag.arms_of(teacher))
    encoding = work.teacher_encoding(teacher, "train", reading)
    key = work.store_key(teacher, reading)
    path = work.paths.shard(teacher, reading, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    need = store.estimate_bytes(
        config, kv_geometry(work.model_config(teacher)), len(key.layers), len(encoding.ids), key.top_logits
    )
    store.check_budget(config, teacher, need, path.parent)
    with explained(f"running {teacher}", config):
        model, pad_id = work.teacher_model(teacher), work.tokenizer(teacher).pad_token_id
        store.build_shard(model, encoding, key, config, shard, path, pad_id)


def make_store_index(work: Workspace, teacher: str, reading) -> None:
    """The index of a store whose shards are there."""
    shards = [work.paths.shard(teacher, reading, i) for i in range(work.config.store.shards)]
    store.write_index(work.paths.store(teacher, reading), work.store_key(teacher, reading), shards)
    made.note(work.dag, work.paths, "teacher_kv", teacher, reading)

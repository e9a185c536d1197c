"""Teacher-KV step: a teacher's store, part by part."""

from __future__ import annotations

from kvpipe.cache import store
from kvpipe.experiment.outofmemory import explained
from kvpipe.steps.inputs import Inputs


def make_shard(inputs: Inputs, teacher: str, reading: str, shard: str) -> None:
    """One shard of a teacher's store; a finished one is kept."""
    config = inputs.config.store
    inputs.check(inputs.dag.arms_of(teacher))
    encoding = inputs.encoding(teacher, "train", reading)
    key = inputs.store_key(teacher, reading)
    path = inputs.paths.shard(teacher, reading, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    need = store.size(key, config, inputs.model_config(teacher), len(encoding.ids))
    store.check_budget(config, teacher, need, path.parent)
    with explained(f"running {teacher}", config):
        model, pad_id = inputs.teacher_model(teacher), inputs.tokenizer(teacher).pad_token_id
        store.build_shard(model, encoding, key, config, int(shard), path, pad_id)


def make_store(inputs: Inputs, teacher: str, reading: str) -> None:
    """A teacher's whole store: the shards that are not there yet, and their index."""
    numbers = range(inputs.config.store.shards)
    for shard in numbers:
        make_shard(inputs, teacher, reading, str(shard))
    shards = [inputs.paths.shard(teacher, reading, i) for i in numbers]
    store.write_index(inputs.paths.store(teacher, reading), inputs.store_key(teacher, reading), shards)

"""A store from key/value caches that others have written: a folder of safetensors, one file for each text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig

from kvpipe.align.rope import Rope
from kvpipe.cache.capture import kv_geometry
from kvpipe.cache.store import Store, StoreKey, attention_cosine, pack, unpack, write_index
from kvpipe.experiment.files import content_digest, save_tensors
from kvpipe.experiment.plan import digest

TENSOR_NAMES = re.compile(r"(?:past_key_values\.|layers\.)?(\d+)\.(key|value)s?$")
"""How a layer's tensors are called: `3.key`, `past_key_values.3.value`, `layers.3.keys`."""


def import_caches(
    folder: str | Path, out: str | Path, config: PretrainedConfig, dtype: str = "bf16", rotated: bool = True
) -> Store:
    """Write a store of caches as transformers' `past_key_values` has them.

    Args:
        folder: of `*.safetensors`, one for each text, read in the order of their names. Each layer has two tensors, named
            as `TENSOR_NAMES` says, `(head, time, dim)` or with a batch axis of 1 in front. Texts are not padded.
        out: the store's folder.
        config: of the model that made them, whose rotary embedding turns the keys back.
        dtype: storage type, as `store.dtype`.
        rotated: whether keys are rotated, as in a cache; False for keys that were taken before it.

    Raises:
        ValueError: no files, a layer that is missing, or shapes that are not the model's.
    """
    files, out = sorted(Path(folder).glob("*.safetensors")), Path(out)
    if not files:
        raise ValueError(f"{folder} has no *.safetensors; save each text's cache as one file")
    layers, ropes = kv_geometry(config).layers, Rope.of_layers(config.get_text_config(decoder=True))
    key = StoreKey(
        model=digest(config.to_dict(), 16),
        data=digest([content_digest(file) for file in files], 16),
        layers=tuple(range(layers)),
        reading="student",
        dtype=dtype,
        top_logits=0,
        shards=len(files),
    )
    out.mkdir(parents=True, exist_ok=True)
    shards = [out / f"shard-{number:05d}.safetensors" for number in range(len(files))]
    for number, (file, shard) in enumerate(zip(files, shards, strict=True)):
        keys, values = _read(file, config)
        if rotated:
            positions = torch.arange(keys.shape[2])
            keys = torch.stack(
                [rope.unrotate(k[None].float(), positions)[0] for rope, k in zip(ropes, keys, strict=True)]
            )
        rows = [rearrange(x.float(), "layer head time dim -> time layer head dim").contiguous() for x in (keys, values)]
        packed = {
            f"{name}{suffix}": x
            for name, exact in zip(("keys", "values"), rows, strict=True)
            for suffix, x in pack(exact, dtype).items()
        }
        stored = [unpack(packed[name], packed.get(f"{name}.scale")) for name in ("keys", "values")]
        metadata = {
            "key": json.dumps({**key.as_dict(), "shard": number}),
            "fidelity": json.dumps(attention_cosine(*rows, *stored)),
        }
        save_tensors(packed, shard, metadata)
    write_index(out, key, shards)
    return Store.open(out)


def _read(file: Path, config: PretrainedConfig) -> tuple[Tensor, Tensor]:
    """Keys and values `(layer, head, time, dim)` of a file."""
    try:
        tensors: Mapping[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is cut off, or no safetensors file ({error})") from None
    found: dict[tuple[int, str], Tensor] = {}
    for name, tensor in tensors.items():
        if match := TENSOR_NAMES.match(name):
            found[int(match[1]), match[2]] = tensor[0] if tensor.ndim == 4 and len(tensor) == 1 else tensor
    layers, heads, dim = kv_geometry(config)
    both = []
    for kind in ("key", "value"):
        missing = [layer for layer in range(layers) if (layer, kind) not in found]
        if missing:
            raise ValueError(f"{file}: no {kind} of layers {missing}; has {', '.join(sorted(tensors)[:4])}, …")
        for layer in range(layers):
            shape = tuple(found[layer, kind].shape)
            if len(shape) != 3 or (shape[0], shape[2]) != (heads, dim):
                raise ValueError(
                    f"{file}: {kind} of layer {layer} is {shape}; expected ({heads}, time, {dim}) (head, time, dim)"
                )
        both.append(torch.stack([found[layer, kind] for layer in range(layers)]))
    return both[0], both[1]

"""Teacher KV on disk: computed once, read by every cell.

A store is `results/teacher_kv/<teacher>/<reading>/`: `index.json` and shards of safetensors; the reading says which text the
teacher read, the student's or its own. A *row* is one teacher token; a shard holds the rows of whole examples, in order, with
keys and values `(row, layer, head, dim)`, so that one token's cache is contiguous and gathers are cheap on a memory map.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpipe.cache.capture import kv_geometry
from kvpipe.cache.forward import Keep, TeacherRows, forward_batches
from kvpipe.cache.rowfile import RowFile
from kvpipe.config import StoreConfig
from kvpipe.data.encoding import Encoding
from kvpipe.experiment.files import GB, content_digest, read_json, verify, write_json
from kvpipe.experiment.paths import INDEX
from kvpipe.experiment.progress import Progress
from kvpipe.experiment.sizes import estimate_bytes as estimate_bytes
from kvpipe.experiment.sizes import shape

VERSION = 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
FIDELITY_ROWS = 512
"""Tokens of a shard's first example in which the stored cache is compared with the exact one."""


# ---------------------------------------------------------------- storage types
def pack(x: Float[Tensor, "row layer head dim"], dtype: str) -> dict[str, Tensor]:
    """Values in their storage type; int8 carries one fp16 scale per row, layer and head.

    Raises:
        ValueError: a number is not finite, or too large for fp16.
    """
    if dtype != "int8":
        packed, carrier = {"": x.to(DTYPES[dtype])}, ""
    else:
        # divided by the scale as it is stored; the clamp keeps it off zero, fp16's smallest number is 2⁻²⁴
        x = x.float()
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2**-24).half()
        packed = {"": (x / scale.float()).round().clamp(-127, 127).to(torch.int8), ".scale": scale.squeeze(-1)}
        carrier = ".scale"
    if not torch.stack(packed[carrier].aminmax()).isfinite().all():  # one pass, which a NaN comes through
        raise ValueError(
            f"teacher KV: the largest number is {x.abs().max().item():.3g}, which store.dtype {dtype} does not hold; "
            "set bf16 if it is finite, else look for the overflow in the teacher"
        )
    return packed


def unpack(x: Tensor, scale: Tensor | None) -> Float[Tensor, "row layer head dim"]:
    """Back to float32."""
    return x.float() if scale is None else x.float() * scale.float()[..., None]


def attention_cosine(
    keys: Float[Tensor, "row layer head dim"],
    values: Float[Tensor, "row layer head dim"],
    stored_keys: Float[Tensor, "row layer head dim"],
    stored_values: Float[Tensor, "row layer head dim"],
) -> float:
    """Mean cosine of attention outputs from the exact and the stored cache, with the keys as queries.

    The fidelity that matters downstream: small errors in keys move attention, errors in values move its output.
    """
    query = rearrange(keys, "row layer head dim -> layer head row dim")

    def attend(k: Tensor, v: Tensor) -> Tensor:
        k, v = (rearrange(t, "row layer head dim -> layer head row dim") for t in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=True)

    exact, stored = attend(keys, values), attend(stored_keys, stored_values)
    return torch.nn.functional.cosine_similarity(exact, stored, dim=-1).mean().item()


# ---------------------------------------------------------------- building
@dataclass(frozen=True)
class StoreKey:
    """What a store's content depends on; a store with another key is refused, not reused."""

    model: str
    """Hash of the model's manifest (weights, config and tokenizer)."""
    data: str
    """Hash of the training split and the template."""
    layers: tuple[int, ...]
    reading: str
    dtype: str
    top_logits: int
    shards: int
    nll: bool = False
    """Whether the teacher's nats of every token are kept; with `top_logits` alone it needs its head."""
    states: bool = False
    """Whether the final states are kept, in bf16: `FullKL` makes the whole vocabulary's logits of them."""
    hidden: tuple[int, ...] = ()
    """Layers whose input is kept, in bf16."""
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return json.loads(json.dumps(self.__dict__))


def check_budget(config: StoreConfig, teacher: str, need: int, folder: Path) -> None:
    """Refuse to start a build that cannot end.

    Raises:
        RuntimeError: the estimate exceeds `store.budget_gb` or the free disk space.
    """
    print(f"{teacher}: the store will take about {need / GB:.3f} GB (budget {config.budget_gb} GB)")
    if need > config.budget_gb * GB:
        raise RuntimeError(
            f"teacher {teacher}: the KV store needs about {need / GB:.2f} GB, store.budget_gb is {config.budget_gb}. "
            "Raise it, store int8, keep fewer layers, or set store.mode: live"
        )
    free = shutil.disk_usage(folder).free
    if need > free:
        raise RuntimeError(
            f"teacher {teacher}: the KV store needs {need / GB:.2f} GB, {folder} has {free / GB:.2f} free"
        )


def size(key: StoreKey, config: StoreConfig, model_config: Any, rows: int, layers: int | None = None) -> int:
    """Estimated bytes of a store for `rows` tokens, with so many layers instead of the key's."""
    found = shape(model_config.to_dict())
    states = found.hidden * (key.states + len(key.hidden)) if found is not None else 0
    layers = len(key.layers) if layers is None else layers
    return estimate_bytes(config, kv_geometry(model_config), layers, rows, key.top_logits, states)


def shard_bounds(examples: int, shards: int, shard: int) -> tuple[int, int]:
    """First and last-plus-one example of a shard: near-equal consecutive parts."""
    if not 0 <= shard < shards:
        raise ValueError(f"shard {shard} of {shards}: count from 0")
    if shards > examples:
        raise ValueError(f"store.shards {shards} for {examples} examples: a shard would be empty, lower it")
    return examples * shard // shards, examples * (shard + 1) // shards


def build_shard(
    model, encoding: Encoding, key: StoreKey, config: StoreConfig, shard: int, path: Path, pad_id: int
) -> None:
    """Run the teacher over one shard's examples, written batch by batch; a finished shard with the same key is kept.

    Memory is the teacher's and one batch's (`forward.ROOM`), however large the shard.

    Raises:
        OSError: the disk is full or refuses, or another process is building the same shard.
    """
    if _shard_key(path) == {**key.as_dict(), "shard": shard}:
        print(f"{path}: already there")
        return
    first, last = shard_bounds(len(encoding), config.shards, shard)
    offsets = encoding.offsets[first : last + 1] - encoding.offsets[first]
    keep, sample, fidelity = (
        Keep(key.layers, key.nll, key.top_logits, key.states, key.hidden),
        slice(0, FIDELITY_ROWS),
        1.0,
    )
    said = [
        f"{size(key, config, model.config, int(offsets[-1]), layers) / GB:.3f} GB for {layers} layers"
        for layers in sorted({len(key.layers), kv_geometry(model.config).layers})
    ]
    print(f"{path}: {offsets[-1]:,} tokens, layers {list(key.layers)}; {', '.join(said)}", flush=True)
    try:
        with (
            RowFile(path) as file,
            Progress(f"{path.parent.parent.name} {path.stem}", int(offsets[-1]), "tokens") as progress,
        ):
            for members, found in forward_batches(
                model, encoding, np.arange(first, last), keep, config.batch_size, pad_id
            ):
                tensors = _packed(found, key.dtype)
                if not progress.done:
                    columns = {name: (x.dtype, (int(offsets[-1]), *x.shape[1:])) for name, x in tensors.items()}
                    file.begin(columns, {"key": json.dumps({**key.as_dict(), "shard": shard})})
                at = 0
                for member in members:
                    rows = slice(at, at := at + int(offsets[member + 1] - offsets[member]))
                    for name, tensor in tensors.items():
                        file.write(name, int(offsets[member]), tensor[rows])
                    if member == 0 and key.layers:
                        exact = (found.keys[rows][sample].float(), found.values[rows][sample].float())
                        stored = [_unpacked(tensors, name, rows)[sample] for name in ("keys", "values")]
                        fidelity = attention_cosine(*exact, *stored)
                progress.add(at)
            file.finish({"fidelity": json.dumps(fidelity)})
    except BlockingIOError as error:
        raise OSError(f"{path}: {error}. Leave this shard to it") from None
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}. Free some space; finished shards are kept") from error


def _packed(found: TeacherRows, dtype: str) -> dict[str, Tensor]:
    """The columns of a shard, in their storage types."""
    tensors = found.named()
    for name in ("keys", "values"):
        exact = tensors.pop(name)
        tensors |= {f"{name}{suffix}": x for suffix, x in pack(exact, dtype).items()} if exact.shape[1] else {}
    for name in ("states", "hidden"):
        if name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)
    return tensors


def _unpacked(tensors: dict[str, Tensor], name: str, rows) -> Tensor:
    scale = tensors.get(f"{name}.scale")
    return unpack(tensors[name][rows], None if scale is None else scale[rows])


def _shard_key(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as handle:
            return json.loads((handle.metadata() or {}).get("key", "null"))
    except SafetensorError as error:  # cut off; it fits no key
        return {"unreadable": str(error)}


def write_index(folder: Path, key: StoreKey, shards: list[Path]) -> None:
    """`index.json`: the key, the checksum of every shard, bytes per token and the measured fidelity.

    Raises:
        ValueError: a shard was built for another key.
    """
    entries: list[dict[str, Any]] = []
    fidelity, rows = [], 0
    for number, path in enumerate(shards):
        found = _shard_key(path)
        if found != {**key.as_dict(), "shard": number}:
            raise ValueError(f"{path}: built for {found}, expected {key.as_dict()}; delete it and build it again")
        with safe_open(path, framework="pt") as handle:
            fidelity.append(json.loads(handle.metadata()["fidelity"]))
            rows += handle.get_slice(next(iter(handle.keys()))).get_shape()[0]
        entries.append(
            {
                "file": path.relative_to(folder).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": content_digest(path),
            }
        )
    index = {
        "key": key.as_dict(),
        "shards": entries,
        "rows": rows,
        "bytes_per_token": sum(e["bytes"] for e in entries) / rows,
        "attention_cosine": float(np.mean(fidelity)),
    }
    write_json(folder / INDEX, index, sort_keys=True)


# ---------------------------------------------------------------- reading
class Store:
    """A memory-mapped store.

    Every shard's checksum is compared with the index's when the store is opened, once in a process.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: the index cannot be read; or a shard is missing, damaged, or not the one in this place.
    """

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The store in a folder."""
        return cls(Path(folder))

    def __init__(self, folder: Path):
        self.folder = folder
        index_path = folder / INDEX
        build = f"`kvpipe teacher-kv --teacher {folder.parent.name} --reading {folder.name}`"
        if not index_path.is_file():
            raise FileNotFoundError(f"{index_path} does not exist: run {build}")
        fix = f"delete it and {index_path}, then run {build}"
        self.index = read_json(index_path, fix)
        try:
            self.layers: tuple[int, ...] = tuple(self.index["key"]["layers"])
            listed = [(folder / entry["file"], entry["bytes"], entry["sha256"]) for entry in self.index["shards"]]
        except KeyError as error:
            raise ValueError(f"{index_path} is damaged (no {error}): {fix}") from None
        except TypeError:
            listed = []
        if not listed:
            raise ValueError(f"{index_path} is damaged (no list of shards): {fix}")
        for path, size, _ in listed:  # said at once, before gigabytes are read
            if not path.is_file() or path.stat().st_size != size:
                raise ValueError(f"{path} is missing or truncated: {fix}")
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda entry: verify(entry[0], entry[2], index_path, fix), listed))
        self._shards: list[dict[str, Tensor]] = []
        for number, (path, _, _) in enumerate(listed):
            if _shard_key(path) != {**self.index["key"], "shard": number}:
                raise ValueError(f"{path} is another store's shard, or another shard of this one: {fix}")
            with safe_open(path, framework="pt") as handle:
                self._shards.append({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
        rows = [len(next(iter(shard.values()))) for shard in self._shards]
        self._bounds = np.concatenate([[0], np.cumsum(rows)])

    def rows(self, name: str, rows: Int64[Tensor, "row"] | None = None) -> Tensor:
        """The given global rows (all by default) of `keys` and `values` (float32), `nll`, `top_ids`, `top_logprobs`,
        `states` or `hidden`."""
        if name not in self._shards[0]:
            raise KeyError(f"{self.folder}: no {name}; has {sorted(self._shards[0])}. Build the store again with it")
        if rows is None:
            return torch.cat([_unpacked(s, name, slice(None)) if _is_cache(name) else s[name] for s in self._shards])
        shard_of = np.searchsorted(self._bounds, rows.numpy(), side="right") - 1
        out = None
        for number in np.unique(shard_of) if len(rows) else (0,):
            here = torch.from_numpy(shard_of == number)
            local = rows[here] - int(self._bounds[number])
            shard = self._shards[number]
            found = _unpacked(shard, name, local) if _is_cache(name) else shard[name][local]
            if len(found) == len(rows):
                return found
            out = found.new_empty(len(rows), *found.shape[1:]) if out is None else out
            out[here] = found
        assert out is not None
        return out


def _is_cache(name: str) -> bool:
    return name in ("keys", "values")

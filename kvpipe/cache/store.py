"""Teacher KV on disk: computed once, read by every cell.

A store is `results/teacher_kv/<teacher>/<reading>/`: `index.json` and shards of safetensors; the reading says which text the
teacher read, the student's or its own. A *row* is one teacher token; a shard holds the rows of whole examples, in order, with
keys and values `(row, layer, head, dim)`, so that one token's cache is contiguous and gathers are cheap on a memory map.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpipe.cache.capture import Recorder, kv_geometry
from kvpipe.config import StoreConfig
from kvpipe.data.batches import collate
from kvpipe.data.encoding import Encoding, concatenated_ranges
from kvpipe.experiment.files import GB, content_digest, read_json, save_tensors, verify, write_json
from kvpipe.experiment.paths import INDEX
from kvpipe.experiment.sizes import estimate_bytes as estimate_bytes
from kvpipe.models.likelihood import PIECE, token_nll

VERSION = 1
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


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
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=2**-24).half()
        packed = {"": (x / scale.float()).round().clamp(-127, 127).to(torch.int8), ".scale": scale.squeeze(-1)}
        carrier = ".scale"
    if not packed[carrier].isfinite().all():
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
    """Run the teacher over one shard's examples and write it; a finished shard with the same key is kept."""
    if _shard_key(path) == {**key.as_dict(), "shard": shard}:
        print(f"{path}: already there")
        return
    first, last = shard_bounds(len(encoding), config.shards, shard)
    examples = np.arange(first, last)
    found = forward_rows(model, encoding, examples, key.layers, config.batch_size, pad_id, key.top_logits)
    tensors = {"nll": found.nll}
    for name, exact in (("keys", found.keys), ("values", found.values)):
        tensors |= {f"{name}{suffix}": tensor for suffix, tensor in pack(exact, key.dtype).items()}
    if found.top_ids is not None and found.top_logprobs is not None:
        tensors |= {"top_ids": found.top_ids, "top_logprobs": found.top_logprobs}
    sample = slice(0, int(encoding.offsets[first + 1] - encoding.offsets[first]))
    stored = [_unpacked(tensors, name, sample) for name in ("keys", "values")]
    fidelity = attention_cosine(found.keys[sample], found.values[sample], *stored)
    metadata = {"key": json.dumps({**key.as_dict(), "shard": shard}), "fidelity": json.dumps(fidelity)}
    try:
        save_tensors(tensors, path, metadata)
    except OSError as error:
        raise OSError(f"{error}. Free some space; finished shards are kept") from error


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


@dataclass(frozen=True)
class TeacherRows:
    """What one teacher says about the tokens of some examples, row by row."""

    keys: Float[Tensor, "row layer head dim"]
    values: Float[Tensor, "row layer head dim"]
    nll: Float[Tensor, "row"]
    """−log p of the token itself, nats; 0 for the first of an example."""
    top_ids: Int[Tensor, "row top"] | None = None
    """Most likely *next* tokens."""
    top_logprobs: Float[Tensor, "row top"] | None = None


@torch.no_grad()
def forward_rows(
    model,
    encoding: Encoding,
    examples: Int64[np.ndarray, "example"],
    layers: Sequence[int],
    batch_size: int,
    pad_id: int,
    top: int = 0,
) -> TeacherRows:
    """Some layers for the rows of some examples, in their order; with `top`, also that many next tokens."""
    device = next(model.parameters()).device
    lengths = encoding.lengths[examples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    _, heads, dim = kv_geometry(model.config)
    out = TeacherRows(
        keys=torch.empty(total, len(layers), heads, dim),
        values=torch.empty(total, len(layers), heads, dim),
        nll=torch.empty(total),
        top_ids=torch.empty(total, top, dtype=torch.int32) if top else None,
        top_logprobs=torch.empty(total, top, dtype=torch.float16) if top else None,
    )
    order = np.argsort(lengths, kind="stable")
    with Recorder(model) as recorder:
        for members in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            batch = collate(encoding, examples[members], pad_id).to(device)
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
            kv = recorder.kv()
            valid = batch.mask
            rows = torch.from_numpy(concatenated_ranges(starts[members], starts[members + 1]))
            for target, tensor in ((out.keys, kv.keys), (out.values, kv.values)):
                picked = rearrange(tensor[list(layers)], "layer batch head time dim -> batch time layer head dim")
                target[rows] = picked[valid].float().cpu()
            nll, ids, logprobs = _next_tokens(logits, batch.labels, top)
            out.nll[rows] = nll[valid].cpu()
            if out.top_ids is not None and out.top_logprobs is not None:
                out.top_ids[rows] = ids[valid].int().cpu()
                out.top_logprobs[rows] = logprobs[valid].half().cpu()
    return out


def _next_tokens(
    logits: Float[Tensor, "batch time vocab"], labels: Int64[Tensor, "batch time"], top: int
) -> tuple[Float[Tensor, "batch time"], Int64[Tensor, "batch time top"], Float[Tensor, "batch time top"]]:
    """Nats of every token, and the `top` most likely next ones: ids and log-probabilities.

    Piece by piece over time: in float32 the logits of 32K positions and 152k tokens are 20 GB, each copy again.
    """
    nll, ids, logprobs = [], [], []
    size = max(1, PIECE // (logits.shape[0] * logits.shape[2]))
    for start in range(0, logits.shape[1], size):
        first = max(0, start - 1)  # a token is scored by the position before it
        stop = start + size
        nll.append(token_nll(logits[:, first:stop], labels[:, first:stop])[:, start - first :])
        best = logits[:, start:stop].float().log_softmax(-1).topk(top, dim=-1) if top else None
        ids.append(best.indices if best else labels.new_zeros(*nll[-1].shape, 0))
        logprobs.append(best.values if best else nll[-1].new_zeros(*nll[-1].shape, 0))
    return torch.cat(nll, 1), torch.cat(ids, 1), torch.cat(logprobs, 1)


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
            rows += handle.get_slice("nll").get_shape()[0]
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
        except (KeyError, TypeError) as error:
            raise ValueError(f"{index_path} is damaged ({error!r} is not in it): {fix}") from None
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

    def rows(self, name: str, rows: Int64[Tensor, "row"] | None = None) -> Tensor:
        """The given global rows (all by default) of `keys` and `values` (float32), `nll`, `top_ids` or `top_logprobs`."""
        if name not in self._shards[0]:
            raise KeyError(f"{self.folder}: no {name}; has {sorted(self._shards[0])}. Build the store again with it")
        if rows is None:
            return torch.cat([_unpacked(s, name, slice(None)) if _is_cache(name) else s[name] for s in self._shards])
        bounds = np.concatenate([[0], np.cumsum([len(shard["nll"]) for shard in self._shards])])
        shard_of = np.searchsorted(bounds, rows.numpy(), side="right") - 1
        out = None
        for number in np.unique(shard_of) if len(rows) else (0,):
            here = torch.from_numpy(shard_of == number)
            local = rows[here] - int(bounds[number])
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

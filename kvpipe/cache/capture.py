"""Keys (before rotary embedding), values, queries and hidden states of any decoder, from one ordinary forward.

Every attention layer of transformers asks `AttentionInterface.get_interface` for the function that does its
attention, and hands that function query, key and value. While a `Recorder` is entered, the function it gets back
notes the three tensors and then calls the one that was asked for. So model code, config, masks and kernels stay
what they are, no cache is needed (gradient checkpointing drops it, sliding windows truncate it), and the tensors
are the ones in the graph. Families with an attention of their own (Bloom, Falcon, GPT-J …) are recorded through
an empty cache that is handed to their forward instead.

What is recorded is what attention sees: keys and values after any bias, clip or norm (`k_norm`, `v_norm`), keys
turned back by the layer's rotary embedding. A layer that shares the keys and values of an earlier one (Gemma 3n)
repeats them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import AttentionInterface

from kvpipe.align.regime import by_own_length, positions_from_mask
from kvpipe.align.rope import Rope, modeling_module
from kvpipe.cache.kv import KV
from kvpipe.experiment.sizes import kv_heads_and_dim


class Geometry(NamedTuple):
    """Layers, KV heads (never the number of query heads) and the real head dimension of a decoder."""

    layers: int
    kv_heads: int
    head_dim: int


def kv_geometry(config: PretrainedConfig) -> Geometry:
    """Layers, KV heads and head dimension that a Hugging Face config promises.

    The recorder checks the tensors against it. Raises ValueError, naming the layers, where layers differ in it.
    """
    config = config.get_text_config(decoder=True)
    if not config.is_heterogeneous:
        return Geometry(config.num_hidden_layers, *_heads(config))
    layers: dict[tuple[int, int], list[int]] = {}
    for layer in range(config.num_hidden_layers):
        layers.setdefault(_heads(config.per_layer_config[layer]), []).append(layer)
    if len(layers) > 1:
        raise ValueError(
            f"model type '{config.model_type}': layers differ in (KV heads, head dimension) and cannot be stacked: "
            + ", ".join(f"layers {of} have {heads}" for heads, of in layers.items())
        )
    return Geometry(config.num_hidden_layers, *next(iter(layers)))


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    """KV heads and head dimension of one layer."""
    found = kv_heads_and_dim(lambda name: getattr(config, name, None))
    if found is None:
        raise ValueError(
            f"model type '{config.model_type}' has no attention heads (a state-space or linear model), so there are no keys "
            "and values to distil; use a teacher and a student with attention"
        )
    return found


class _Layer(NamedTuple):
    """What one attention layer was given: (batch, head, time, dim), query and key rotated."""

    query: Tensor | None
    key: Tensor
    value: Tensor

    def to(self, device: torch.device) -> _Layer:
        """The tensors on a device."""
        return _Layer(*(None if tensor is None else tensor.to(device) for tensor in self))  # type: ignore[arg-type]


class Recorder:
    """Records what the attention layers of `model` are given during each forward made while it is entered.

    >>> with Recorder(model) as recorder:                                                # doctest: +SKIP
    ...     output = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    >>> kv = recorder.kv()                                                               # doctest: +SKIP

    Tensors keep their graph. One recorder serves any number of steps: each forward replaces the record of the
    last one, and recomputation in the backward pass of gradient checkpointing is not recorded. `model` is a
    causal language model or its decoder, also inside DDP, FSDP or peft. With `hidden`, hidden states are kept too; without
    `queries` none of those, which would otherwise outlive their use; with `layers`, keys and values of these layers alone,
    and no queries.
    """

    def __init__(
        self, model: nn.Module, hidden: bool = False, layers: Sequence[int] | None = None, queries: bool = True
    ):
        self.model = model
        config: Any = getattr(model, "config", None) or getattr(model.module, "config", None)  # DDP has none of its own
        self.config: PretrainedConfig = config.get_text_config(decoder=True)
        self.geometry = kv_geometry(self.config)
        self.ropes = Rope.of_layers(self.config)
        self.layers = tuple(range(self.geometry.layers)) if layers is None else tuple(layers)
        self._queries = layers is None and queries
        self._switches = any(rope.long_context is not None for rope in self.ropes)
        by_own_length(model)
        self._through_cache = not hasattr(modeling_module(self.config), "ALL_ATTENTION_FUNCTIONS")
        self._hidden = hidden
        self._hidden_states: tuple[Tensor, ...] | None = None
        self._record: dict[int, _Layer] = {}
        self._positions: Tensor | None = None
        self._recording = self._grad = False
        self._layer_of: dict[int, int] = {}
        self._handles: list = []

    def __enter__(self) -> Recorder:
        if self in _entered:
            raise RuntimeError(f"this recorder of {self._name} is already entered")
        self.ropes = Rope.of_model(self.model, self.config)
        modules: Any = self.model.modules()
        self._layer_of = {id(m): m.layer_idx for m in modules if getattr(m, "layer_idx", None) is not None}
        self._handles = [
            self.model.register_forward_pre_hook(self._start, with_kwargs=True),
            self.model.register_forward_hook(self._stop, always_call=True),
        ]
        _entered.append(self)
        AttentionInterface.get_interface = _recording_interface  # type: ignore[method-assign]
        return self

    def __exit__(self, *_) -> None:
        _entered.remove(self)
        if not _entered:
            AttentionInterface.get_interface = _get_interface  # type: ignore[method-assign]
        for handle in self._handles:
            handle.remove()
        self._recording = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside are not recorded, nor refused for a cache that they go on from."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _start(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        self._record, self._hidden_states = {}, None
        self._positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if self._positions is None and self._switches and mask is not None:  # as `by_own_length` has the model count
            self._positions = positions_from_mask(mask)
        self._recording, self._grad = True, torch.is_grad_enabled()
        if self._hidden:
            kwargs = {**kwargs, "output_hidden_states": True}
        if self._through_cache:
            if kwargs.get("past_key_values") is not None:
                raise ValueError(f"{self._name} is recorded through its cache: call it without past_key_values")
            kwargs = {**kwargs, "past_key_values": _RecordingCache(self), "use_cache": True}
        return args, kwargs

    def _stop(self, _module: nn.Module, _args: tuple, output) -> None:
        self._recording = False
        if self._hidden and output is not None:
            self._hidden_states = output.hidden_states

    def note(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep what `module` was given, if it is an attention layer of this recorder's model."""
        layer = self._layer_of.get(id(module))
        if layer is not None and self._recording:
            if key.shape[2] != query.shape[2]:
                raise ValueError(
                    f"{self._name} layer {layer}: {key.shape[2]} keys for {query.shape[2]} queries; the forward was "
                    "given a cache that is not empty or not dynamic. Record a forward over the whole text"
                )
            self._keep(layer, _Layer(query, key, value))

    def _keep(self, layer: int, entry: _Layer) -> None:
        if self._grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{self._name} layer {layer} ran without gradient inside a forward with gradient: reentrant gradient "
                "checkpointing cuts recorded keys and values from the graph. Enable it with use_reentrant=False"
            )
        if layer not in self.layers:
            return
        if layer in self._record:
            raise RuntimeError(f"{self._name} layer {layer} attended twice in one forward: its keys are not one tensor")
        self._record[layer] = entry if self._queries else entry._replace(query=None)

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} ({self.config.model_type})"

    def _layers(self) -> list[_Layer]:
        """The record, complete and as the config promises, or an error that says what is not."""
        layers, kv_heads, head_dim = self.geometry
        missing = [layer for layer in self.layers if layer not in self._record]
        if missing:
            route = " This family is recorded through its cache, which gradient checkpointing drops: switch it off."
            raise RuntimeError(
                f"{self._name}: no keys and values were recorded for layers {missing} of {layers}. Run one forward "
                "while the recorder is entered; layers without attention (state-space, linear) have none to record."
                + (route if self._through_cache else "")
            )
        record = [self._record[layer] for layer in self.layers]
        if any(entry.key.device != record[0].key.device for entry in record):  # layers spread over devices
            record = [entry.to(record[0].key.device) for entry in record]
        if self.config.model_type == "falcon" and record[0].key.shape[1] > kv_heads:  # repeated for each query head
            group = record[0].key.shape[1] // kv_heads
            record = [e._replace(key=e.key[:, ::group], value=e.value[:, ::group]) for e in record]
        value_dim = getattr(self.config, "v_head_dim", None) or head_dim
        for layer, entry in zip(self.layers, record, strict=True):
            for name, tensor, dim in (("keys", entry.key, head_dim), ("values", entry.value, value_dim)):
                if tensor.shape[1] != kv_heads or tensor.shape[3] != dim:
                    raise ValueError(
                        f"{self._name} layer {layer}: {name} are {tuple(tensor.shape)} (batch, head, time, dim), but "
                        f"the config promises {kv_heads} KV heads of dimension {dim}"
                    )
        return record

    @property
    def sees_queries(self) -> bool:
        """False for families that are recorded through their cache, where keys and values alone pass, with `layers`, and
        where none were asked for."""
        return self._queries and not self._through_cache

    def kv(self, positions: Int[Tensor, "*batch time"] | None = None) -> KV:
        """Unrotated keys, and values, of every layer (of `layers`, in their order), with their graph.

        `positions`: (batch, time) or (time,); by default the `position_ids` of the forward, else 0, 1, 2, …. Raises
        RuntimeError for layers that were not recorded, ValueError for shapes that the config does not promise.
        """
        return KV(self.keys(positions), self.values())

    def keys(self, positions: Int[Tensor, "*batch time"] | None = None) -> Float[Tensor, "layer batch head time dim"]:
        """The keys of `kv` alone."""
        return self._unrotate([entry.key for entry in self._layers()], positions)

    def values(self) -> Float[Tensor, "layer batch head time value_dim"]:
        """The values of `kv` alone."""
        return torch.stack([entry.value for entry in self._layers()])

    def rows(
        self, mask: Bool[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "row layer head dim"], Float[Tensor, "row layer head dim"]]:
        """`kv` of the unmasked tokens alone, one after the other, made layer by layer: of no other copy there is more."""
        record, ropes = self._layers(), [self.ropes[layer] for layer in self.layers]
        keys, values = (x.new_empty(int(mask.sum()), len(record), x.shape[1], x.shape[3]) for x in record[0][1:])
        mask, positions = mask.to(keys.device), self._positions_of(record[0].key, None)
        for place, (entry, rope) in enumerate(zip(record, ropes, strict=True)):
            for out, x in ((keys, rope.unrotate(entry.key, positions)), (values, entry.value)):
                out[:, place] = rearrange(x, "batch head time dim -> batch time head dim")[mask]
        return keys, values

    def queries(
        self, positions: Int[Tensor, "*batch time"] | None = None
    ) -> Float[Tensor, "layer batch query_head time dim"]:
        """Unrotated queries of every layer, with their graph. `positions` as in `kv`."""
        if not self.sees_queries:
            raise ValueError(
                f"{self._name} is recorded through its cache, for some layers alone or without queries: no queries are kept"
            )
        return self._unrotate([entry.query for entry in self._layers() if entry.query is not None], positions)

    def hidden_states(self) -> Float[Tensor, "layer batch time width"]:
        """What enters each layer (the embedding for layer 0), with its graph; needs `Recorder(model, hidden=True)`."""
        if self._hidden_states is None:
            raise RuntimeError(f"{self._name}: no hidden states; use Recorder(model, hidden=True) and run a forward")
        states = self._hidden_states[: self.geometry.layers]
        return torch.stack([state.to(states[0].device) for state in states])

    def _unrotate(self, per_layer: list[Tensor], positions: Tensor | None) -> Tensor:
        positions, ropes = self._positions_of(per_layer[0], positions), [self.ropes[layer] for layer in self.layers]
        if any(rope is not ropes[0] for rope in ropes):
            return torch.stack([r.unrotate(k, positions) for r, k in zip(ropes, per_layer, strict=True)])
        # one rotary embedding: one call for all layers
        folded = rearrange(per_layer, "layer batch head time dim -> batch (layer head) time dim")
        unrotated = ropes[0].unrotate(folded, positions)
        return rearrange(unrotated, "batch (layer head) time dim -> layer batch head time dim", layer=len(per_layer))

    def _positions_of(self, like: Tensor, positions: Tensor | None) -> Tensor:
        """The given positions, else those of the forward, else 0, 1, 2, …"""
        given = self._positions if positions is None else positions
        return torch.arange(like.shape[2], device=like.device) if given is None else given.to(like.device)


class _RecordingCache(DynamicCache):
    """A cache that is always empty: it notes what a layer stores and hands it straight back."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args, **_kwargs):
        self._recorder._keep(layer_idx, _Layer(None, key_states, value_states))
        return key_states, value_states


_entered: list[Recorder] = []
_get_interface = AttentionInterface.get_interface


@functools.wraps(_get_interface)
def _recording_interface(self: AttentionInterface, attn_implementation: str, default: Callable) -> Callable:
    attend = _get_interface(self, attn_implementation, default)

    def recorded(module, query, key, value, *args, **kwargs):
        for recorder in _entered:
            recorder.note(module, query, key, value)
        return attend(module, query, key, value, *args, **kwargs)

    return recorded


@torch.no_grad()
def capture(
    model: nn.Module,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | None = None,
) -> KV:
    """Keys before rotation and values of every layer, (layer, batch, head, time, dim), without gradient.

    Left and right padding are both right: positions are counted by `positions_from_mask`. What stands at masked
    positions is not defined. Raises as `Recorder.kv` does, and for the families that `Rope.from_config` refuses.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    positions = positions_from_mask(attention_mask)
    language_model: Any = getattr(model, "module", model)  # inside DDP
    decoder = language_model.get_decoder()  # no logits: over a large vocabulary they are the largest tensor
    accepted = inspect.signature(decoder.forward).parameters
    options = {"position_ids": positions, "use_cache": False}
    with Recorder(decoder) as recorder:
        decoder(input_ids, attention_mask=attention_mask, **{k: v for k, v in options.items() if k in accepted})
    return recorder.kv(positions)

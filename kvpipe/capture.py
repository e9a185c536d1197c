"""Keys (before rotary embedding), values, queries and hidden states of any decoder, from one ordinary forward.

Every attention layer of transformers asks `AttentionInterface.get_interface` for the function that does its
attention, and hands that function query, key and value. While a `Recorder` is entered, the function it gets back
notes the three tensors and then calls the one that was asked for. So model code, config, masks and kernels stay
what they are, no cache is needed (gradient checkpointing drops it, sliding windows truncate it), and the tensors
are the ones in the graph. Families with an attention of their own are recorded through their cache instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from kvpipe.align.rope import Rope
from kvpipe.shapes import KV


class Geometry(NamedTuple):
    """Layers, KV heads (`num_key_value_heads`) and head dimension of a decoder."""

    layers: int
    kv_heads: int
    head_dim: int


def kv_geometry(config: PretrainedConfig) -> Geometry:
    """Layers, KV heads and head dimension that a config promises; the recorder checks the tensors against it."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Geometry(config.num_hidden_layers, kv_heads, head_dim)


def positions_from_mask(attention_mask: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Positions as `generate` of transformers counts them: from 0 at the first unmasked token; masked tokens get 0."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 0)


class _Layer(NamedTuple):
    """What one attention layer was given: (batch, head, time, dim), rotated."""

    query: Tensor | None
    key: Tensor
    value: Tensor


class Recorder:
    """Records what the attention layers of `model` are given during each forward made while it is entered.

    >>> with Recorder(model) as recorder:                                        # doctest: +SKIP
    ...     output = model(input_ids=ids, attention_mask=mask, position_ids=positions)
    >>> kv = recorder.kv()                                                       # doctest: +SKIP

    Tensors keep their graph. One recorder may serve many steps: each forward replaces the record of the last one;
    recomputation in the backward pass of gradient checkpointing is not recorded.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.config: PretrainedConfig = model.config.get_text_config(decoder=True)
        self.geometry = kv_geometry(self.config)
        self.ropes = Rope.of_layers(self.config)
        self._record: dict[int, _Layer] = {}
        self._positions: Tensor | None = None
        self._recording = False
        self._grad = False
        self._layer_ids: dict[int, int] = {}
        self._handles: list = []

    def __enter__(self) -> Recorder:
        self._layer_ids = {
            id(m): m.layer_idx for m in self.model.modules() if getattr(m, "layer_idx", None) is not None
        }
        self._handles = [
            self.model.register_forward_pre_hook(self._start, with_kwargs=True),
            self.model.register_forward_hook(self._stop, always_call=True),
        ]
        _entered.append(self)
        if len(_entered) == 1:
            AttentionInterface.get_interface = _recording_interface
        return self

    def __exit__(self, *_) -> None:
        _entered.remove(self)
        if not _entered:
            AttentionInterface.get_interface = _get_interface
        for handle in self._handles:
            handle.remove()
        self._recording = False

    def _start(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._record = {}
        self._positions = kwargs.get("position_ids")
        self._recording, self._grad = True, torch.is_grad_enabled()

    def _stop(self, *_) -> None:
        self._recording = False

    def note(self, module: nn.Module, query: Tensor | None, key: Tensor, value: Tensor) -> None:
        """Keep what `module` was given, if it is a layer of this recorder's model and a forward is under way."""
        layer = self._layer_ids.get(id(module))
        if layer is None or not self._recording:
            return
        if self._grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"{self._name} layer {layer} ran without gradient inside a forward with gradient: reentrant gradient "
                "checkpointing cuts recorded keys and values from the graph. Use "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        if layer in self._record:
            raise RuntimeError(f"{self._name} layer {layer} attended twice in one forward ({type(module).__name__})")
        self._record[layer] = _Layer(query, key, value)

    @property
    def _name(self) -> str:
        return f"{type(self.model).__name__} ({self.config.model_type})"

    def _layers(self) -> list[_Layer]:
        """The record, complete and as the config promises, or an error that says what is not."""
        layers, kv_heads, head_dim = self.geometry
        missing = [layer for layer in range(layers) if layer not in self._record]
        if missing:
            raise RuntimeError(
                f"{self._name}: no keys and values were recorded for layers {missing} of {layers}. Run one forward "
                "while the recorder is entered; layers without attention (state-space, linear) have none to record."
            )
        record = [self._record[layer] for layer in range(layers)]
        for layer, entry in enumerate(record):
            for name, tensor in (("keys", entry.key), ("values", entry.value)):
                if tensor.shape[1] != kv_heads or tensor.shape[3] != head_dim:
                    raise ValueError(
                        f"{self._name} layer {layer}: {name} are {tuple(tensor.shape)} (batch, head, time, dim), but "
                        f"the config promises {kv_heads} KV heads of dimension {head_dim}"
                    )
        return record

    def _resolve(self, positions: Tensor | None, like: Tensor) -> Tensor:
        if positions is None:
            positions = self._positions
        if positions is None:
            positions = torch.arange(like.shape[2])
        return positions.to(like.device)

    def kv(self, positions: Int[Tensor, "*batch time"] | None = None) -> KV:
        """Unrotated keys, and values, of every layer, with their graph.

        `positions`: (batch, time) or (time,); by default the `position_ids` of the forward, else 0, 1, 2, ….
        """
        record = self._layers()
        keys = self._unrotate([entry.key for entry in record], positions)
        return KV(keys, torch.stack([entry.value for entry in record]))

    def queries(
        self, positions: Int[Tensor, "*batch time"] | None = None
    ) -> Float[Tensor, "layer batch query_head time dim"]:
        """Unrotated queries of every layer, with their graph. `positions` as in `kv`."""
        return self._unrotate([entry.query for entry in self._layers()], positions)

    def _unrotate(self, per_layer: list[Tensor], positions: Tensor | None) -> Tensor:
        positions = self._resolve(positions, per_layer[0])
        if all(rope is self.ropes[0] for rope in self.ropes):  # one call for all layers
            folded = rearrange(per_layer, "layer batch head time dim -> batch (layer head) time dim")
            unrotated = self.ropes[0].unrotate(folded, positions)
            return rearrange(
                unrotated, "batch (layer head) time dim -> layer batch head time dim", layer=len(per_layer)
            )
        return torch.stack([r.unrotate(k, positions) for r, k in zip(self.ropes, per_layer, strict=True)])


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
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | None = None,
) -> KV:
    """Keys before rotation and values of every layer, (layer, batch, head, time, dim), without gradient.

    Left and right padding are both right: positions are counted by `positions_from_mask`. What stands at masked
    positions is not defined.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    positions = positions_from_mask(attention_mask)
    decoder = getattr(model, model.base_model_prefix, model)  # no logits: the vocabulary is the largest tensor
    kwargs = {"position_ids": positions, "use_cache": False}
    accepted = inspect.signature(decoder.forward).parameters
    with Recorder(decoder) as recorder:
        decoder(input_ids, attention_mask=attention_mask, **{k: v for k, v in kwargs.items() if k in accepted})
    return recorder.kv(positions)

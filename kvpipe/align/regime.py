"""Rotary embeddings that depend on a call's length (dynamic NTK, LongRoPE), made to depend on each text alone.

transformers chooses the frequencies by the longest row of a batch, and under dynamic NTK keeps those of the longest call
so far: the same text then has another cache in another batch, or at another time. `by_own_length` gives every row the
frequencies of its own length, computed afresh in every call, which are those of the text alone in a new model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig

Model = TypeVar("Model", bound=nn.Module)


def positions_from_mask(attention_mask: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Positions as `generate` of transformers counts them: from 0 at the first unmasked token; masked tokens get 0."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 0)


def switch_lengths(config: PreTrainedConfig) -> list[int]:
    """The numbers of positions beyond which some layers' frequencies change; empty where none do."""
    config = config.get_text_config(decoder=True)
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    of_layers = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    found = {
        config.max_position_embeddings if "dynamic" in p["rope_type"] else p["original_max_position_embeddings"]
        for p in of_layers
        if "dynamic" in p.get("rope_type", "") or p.get("rope_type") == "longrope"
    }
    return sorted(found)


def by_own_length(model: Model) -> Model:
    """Give each row of `model`'s batches the frequencies of its own length, for good; the model itself is returned.

    Nothing is changed in a model whose frequencies do not depend on length, nor a second time.
    """
    for parent in list(model.modules()):
        for rotary in parent.children():
            config = getattr(rotary, "config", None)
            if not hasattr(rotary, "rope_type") or isinstance(rotary.forward, _OwnLength):
                continue
            switches = switch_lengths(config) if isinstance(config, PreTrainedConfig) else []
            if switches:
                rotary.forward = _OwnLength(rotary, rotary.forward, switches[0])
                parent.register_forward_pre_hook(_count_from_mask, with_kwargs=True)
    return model


@contextmanager
def of_length(model: nn.Module, length: int) -> Iterator[None]:
    """Calls inside take all rows as parts of texts of `length` tokens: a long text that is read in chunks."""
    found = [m.forward for m in by_own_length(model).modules() if isinstance(m.forward, _OwnLength)]
    try:
        for own in found:
            own.length = length
        yield
    finally:
        for own in found:
            own.length = None


def _count_from_mask(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Positions of every row, where the call leaves them open: without them all rows seem as long as the longest."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    tokens = kwargs.get("input_ids", args[0] if args else None)
    time = (tokens if tokens is not None else kwargs["inputs_embeds"]).shape[1]
    return args, {**kwargs, "position_ids": positions_from_mask(mask)[:, -time:]}


class _OwnLength:
    """The forward of a rotary module, called once for each length that is among the rows."""

    def __init__(self, rotary: Any, forward: Any, context: int):
        self.rotary, self.forward, self.context = rotary, forward, context
        self.length: int | None = None

    def __call__(self, x: Tensor, position_ids: Tensor, *args, **kwargs):
        """cos and sin of every row, as the family gives them."""
        lengths = (position_ids.amax(-1) + 1).tolist()
        if self.length is not None:
            lengths = [self.length] * len(lengths)
            # a last position that is as far as the text goes, and cut off again
            last = position_ids.new_full((len(position_ids), 1), self.length - 1)
            position_ids = torch.cat([position_ids, last], dim=1)
        groups: dict[int, list[int]] = {}
        for row, length in enumerate(lengths):
            groups.setdefault(length if length > self.context else 0, []).append(row)
        parts = []
        for rows in groups.values():
            self._forget()
            parts.append(self.forward(x, position_ids[rows], *args, **kwargs))
        order = torch.tensor([row for rows in groups.values() for row in rows], device=position_ids.device).argsort()
        time = slice(None) if self.length is None else slice(-1)
        if isinstance(parts[0], Tensor):  # complex turns (Llama 4)
            return torch.cat(parts)[order][:, time]
        return tuple(torch.cat(tables)[order][:, time] for tables in zip(*parts, strict=True))

    def _forget(self) -> None:
        """The frequencies and the longest length of a new module."""
        rotary = self.rotary
        for name in [name for name in vars(rotary) | rotary._buffers if name.endswith("original_inv_freq")]:
            prefix = name.removesuffix("original_inv_freq")
            held = getattr(rotary, f"{prefix}inv_freq")
            setattr(rotary, f"{prefix}inv_freq", getattr(rotary, name).to(held.device, copy=True))
            setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)

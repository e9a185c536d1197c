"""A teacher's cache as one that a student goes on from: one prefill serves both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from kvpipe.align.rope import Rope
from kvpipe.align.time import gather_time
from kvpipe.distill.projectors import Projector

TimeWeights = tuple[Integer[Tensor, "dst_time entry"], Float[Tensor, "dst_time entry"]]
"""Teacher positions of every student token and their weights, as `kvpipe.tokens.matrix.gather_form` gives them."""


@torch.no_grad()
def translate_cache(
    teacher_cache: Cache,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    projector: Projector,
    layers: Sequence[int],
    overlap: TimeWeights | None = None,
) -> DynamicCache:
    """The student's cache of a prompt, made from its teacher's instead of a forward of its own.

    Keys are turned back by the teacher's rotary embedding, brought to the student's tokens, projected, and turned by the
    student's. `student.generate(input_ids, past_key_values=cache)` goes on from the result where `input_ids` is the whole
    prompt and the cache holds all of its tokens but the last.

    Args:
        teacher_cache: of a forward of the teacher with `use_cache=True` over texts of one length, without padding.
        teacher: whose cache it is.
        student: who goes on from it.
        projector: fitted; of `fit.method: identity` for a teacher of the student's shape.
        layers: teacher layers, in the order in which the projector counts them.
        overlap: the teacher tokens of every student token; None where both have the same tokens. A student token that has
            none, as before the teacher's first token has ended, takes the teacher's first.

    Returns:
        A cache with the student's layers, heads and head dimension, in its type, of as many positions as student tokens.

    Raises:
        ValueError: the cache lacks tokens (a sliding window has dropped them), or has no such layer.
    """
    if max(layers) >= len(teacher_cache.layers):
        raise ValueError(f"the teacher's cache has {len(teacher_cache.layers)} layers, {max(layers)} is asked for")
    held: dict[int, Any] = {layer: teacher_cache.layers[layer] for layer in layers}
    read = teacher_cache.get_seq_length()
    if short := [layer for layer, entry in held.items() if entry.keys.shape[2] < read]:
        raise ValueError(
            f"layers {short} of the teacher's cache hold fewer than the {read} tokens that were read: its sliding window "
            "is shorter; translate a shorter prompt"
        )
    src_ropes, positions = Rope.of_model(teacher, teacher.config), torch.arange(read, device=teacher.device)
    keys = torch.stack([src_ropes[layer].unrotate(entry.keys.float(), positions) for layer, entry in held.items()])
    values = torch.stack([entry.values.float() for entry in held.values()])
    if overlap is not None:
        index, weight = overlap
        empty = weight.sum(-1) == 0
        weight = torch.where(empty[:, None], torch.eye(1, weight.shape[1]).to(weight), weight)
        keys, values = (gather_time(x, index * ~empty[:, None], weight) for x in (keys, values))
    rows = "layer batch head time dim -> batch time layer head dim"
    found = projector(rearrange(keys, rows), rearrange(values, rows))
    cache, (device, dtype) = DynamicCache(config=student.config), (student.device, student.dtype)
    positions = torch.arange(found.keys.shape[3], device=found.keys.device)
    for layer, rope in enumerate(Rope.of_model(student, student.config)):
        rotated = rope.rotate(found.keys[layer], positions)
        cache.update(rotated.to(device, dtype), found.values[layer].to(device, dtype), layer)
    return cache

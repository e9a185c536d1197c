"""A model with its weights in few bits: what that costs it, and how small its file could be."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

Bits = Literal["int8", "int4"]
GROUP = 32
"""Weights of a row that share a scale in 4 bits; in 8 bits a row does."""


@torch.no_grad()
def quantize(model: nn.Module, kind: Bits) -> int:
    """Round the weights of all linear layers but the head to so many bits, symmetric, and back, in place.

    Few processors have kernels that multiply such weights; rounded ones compute the same everywhere, in the time of the
    others. (torchao, imported by transformers wherever it is installed, adds a second to every command.)

    Returns:
        Bytes of the weights as a file would hold them: packed, with a scale for each row or group, all else as it is.

    Raises:
        ValueError: a layer's inputs do not divide into groups.
    """
    head, most = model.get_output_embeddings(), {"int8": 127, "int4": 7}[kind]  # type: ignore[operator]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head:
            continue
        if kind == "int4" and layer.in_features % GROUP:
            what = f"int4 takes {GROUP} weights at a time, and {name} has {layer.in_features} inputs; use int8"
            raise ValueError(f"evaluate.variants: {what}")
        weight = layer.weight
        rows = weight.float().reshape(-1, layer.in_features if kind == "int8" else GROUP)
        scales = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / most
        zeros = torch.zeros(len(rows), dtype=torch.int32, device=rows.device)
        rounded = torch.fake_quantize_per_channel_affine(rows, scales, zeros, 0, -most - 1, most)
        weight.copy_(rounded.reshape(weight.shape))
        saved = weight.numel() * weight.element_size() - weight.numel() * (8 if kind == "int8" else 4) // 8
        size += len(rows) * weight.element_size() - saved
    return size

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
    """Round the weights of all linear layers but the head, in place, symmetric, by torchao.

    They are dequantized at once: few processors have kernels for such weights, and what is computed is the same
    everywhere.

    Returns:
        Bytes of the weights as a file would hold them: packed, with a scale for each row or group, all else as it is.

    Raises:
        ValueError: a layer's inputs do not divide into groups.
    """
    # seconds to import
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    head = model.get_output_embeddings()  # type: ignore[operator]
    chosen = {id(m): m for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    for name, module in model.named_modules():
        if kind == "int4" and id(module) in chosen and module.in_features % GROUP:
            raise ValueError(
                f"evaluate.variants: int4 takes {GROUP} weights at a time, and {name} has {module.in_features} inputs; use int8"
            )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    bits, granularity = (8, PerAxis(0)) if kind == "int8" else (4, PerGroup(GROUP))
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, kind), granularity=granularity)
    quantize_(model, config, lambda module, _name: id(module) in chosen)
    for layer in chosen.values():
        weight = layer.weight.dequantize()
        layer.weight = nn.Parameter(weight, requires_grad=False)
        scales = weight.shape[0] if kind == "int8" else weight.numel() // GROUP
        size -= weight.numel() * weight.element_size() - weight.numel() * bits // 8 - scales * weight.element_size()
    return size

"""The head of a causal language model, from final states to logits, a piece of the rows at a time.

Over a large vocabulary the logits of a batch are its largest tensor by far: 8,192 tokens and 262,144 words are 8.6 GB in
float32, and each copy again. `final_states` stops the model's own forward before its head; `Head` takes it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from kvpipe.experiment.sizes import PIECE

SCALES: dict[str, Callable[[float], float]] = {"logit_scale": float, "logits_scaling": lambda divisor: 1 / divisor}
"""Settings by which families multiply (Cohere) or divide (Granite) their logits."""


@dataclass(frozen=True)
class Head:
    """``logits = softcap · tanh(scale · (states · weightᵀ + bias) / softcap)``; without softcap the argument of tanh.

    Without a weight, the states are logits already: those of a family that makes them otherwise.
    """

    weight: Float[Tensor, "vocab width"] | None = None
    bias: Float[Tensor, "vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Head:
        """The head of a causal language model, checked against the model's own logits of two tokens.

        States are made sixteen times as large for the check, so that a cap on the logits shows. The head holds the model's
        own parameters, tied to the embeddings or not.
        """
        whole: Any = getattr(model, "module", model)  # inside DDP
        layer, config = whole.get_output_embeddings(), whole.config.get_text_config(decoder=True)
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
            return cls()
        factors = [turn(value) for name, turn in SCALES.items() if (value := getattr(config, name, None)) is not None]
        softcap = getattr(config, "final_logit_softcapping", None)
        seen: list[Tensor] = []

        def enlarged(_layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            seen.append((args[0] * 16).to(_computed_in(args[0])))  # asked inside, where accelerate's autocast holds
            return (seen[0],)

        handle = layer.register_forward_pre_hook(enlarged)
        try:
            ids = torch.arange(2, device=layer.weight.device)[None]
            logits = whole(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
        finally:
            handle.remove()
        # a sharded weight is whole from the forward on
        head = cls(layer.weight, layer.bias, factors[0] if factors else 1.0, softcap)
        found = head.cast(seen[0].dtype).logits(seen[0]).float()
        tolerance = 1e-4 if seen[0].dtype == torch.float32 else 2e-2
        return head if (found - logits).abs().max() <= tolerance * logits.abs().max() else cls()

    @property
    def parameters(self) -> list[Tensor]:
        """Weight and bias, as far as there are any."""
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None]

    def cast(self, dtype: torch.dtype) -> Head:
        """The same in the states' dtype, in which autocast would compute it: once, and not for every piece."""
        return replace(
            self,
            weight=None if self.weight is None else self.weight.to(dtype),
            bias=None if self.bias is None else self.bias.to(dtype),
        )

    def raw(self, states: Float[Tensor, "*row width"]) -> Float[Tensor, "*row vocab"]:
        """The linear map alone."""
        return states if self.weight is None else F.linear(states, self.weight, self.bias)

    def finished(self, raw: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row vocab"]:
        """Scaled and capped."""
        logits = raw if self.scale == 1 else raw * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, states: Float[Tensor, "*row width"]) -> Float[Tensor, "*row vocab"]:
        """As the model makes them; `states` and the head in one dtype."""
        return self.finished(self.raw(states))

    def pieces(self, states: Float[Tensor, "row width"], least: int = 1) -> Iterator[slice]:
        """Slices of the rows whose logits are at most `PIECE` numbers, or `least` rows."""
        size = max(least, PIECE // (states.shape[1] if self.weight is None else len(self.weight)))
        return (slice(start, min(start + size, len(states))) for start in range(0, len(states), size))


def final_states(model: nn.Module, head: Head, **inputs: Any) -> tuple[Float[Tensor, "batch time width"], Any]:
    """What the head is given in a forward over `inputs`, with its graph, and the model's output, whose logits have no rows.

    The forward is the model's own, whatever wraps it (autocast, DDP, peft, checkpointing): its head is handed no rows. Of a
    family without a known head (`Head()`), the logits. Under autocast the states come in its dtype.
    """
    if head.weight is None:
        output = model(**inputs)
        return output.logits, output
    whole: Any = getattr(model, "module", model)
    seen: list[Tensor] = []

    def hold(_layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(args[0].to(_computed_in(args[0])))
        return (args[0][..., :0, :],)

    handle = whole.get_output_embeddings().register_forward_pre_hook(hold)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    return seen[0], output


def _computed_in(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's result."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

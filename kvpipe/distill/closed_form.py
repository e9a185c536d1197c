"""Closed form first: key and value projections of the student that give the fused target from its own inputs.

Where layers were taken out of a model, those that are left read other inputs than they were made for. Linear maps that make
up for it need no training (ReplaceMe, https://arxiv.org/abs/2505.02819, does so for whole blocks).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvpipe.cache.capture import Recorder
from kvpipe.data.batches import Batch
from kvpipe.distill.targets import FusedTarget
from kvpipe.models.head import Head, final_states

START_EXAMPLES = 64
"""Training texts from which the projections are made; they are read as one batch."""
PENALTY = 1e-2
"""Of a change of a projection, relative to the mean square of its inputs."""


@torch.no_grad()
def start_from(student: nn.Module, batch: Batch, target: FusedTarget, penalty: float = PENALTY) -> None:
    """Set every layer's key and value projection, bottom up: a layer's inputs are those that the layers set before give.

    A projection becomes that of the least squared error on the batch, and of those the one nearest to what it was.

    Args:
        student: its attention layers have linear `k_proj` and `v_proj`, of which attention sees the outputs as they are.
        batch: texts.
        target: of these texts.
        penalty: of a change.

    Raises:
        ValueError: the student's attention has other projections, or its keys are normalised behind them.
    """
    mask = batch.mask & target.mask
    given: dict[tuple[int, str], Tensor] = {}
    wanted = {"k_proj": target.fused.keys, "v_proj": target.fused.values}
    training, head = student.training, Head.of(student)  # which tries the model out
    student.eval()
    with ExitStack() as hooks, Recorder(student, queries=False) as recorder:
        for layer, name, projection in _projections(student, recorder.geometry.layers):
            goal = rearrange(wanted[name][layer], "batch head time dim -> batch time (head dim)")[mask]
            hook = projection.register_forward_hook(_setting(goal, mask, penalty, given, (layer, name)))
            hooks.callback(hook.remove)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        final_states(student, head, **inputs)
        seen = recorder.kv()
    student.train(training)
    for (layer, name), output in given.items():
        kind = seen.keys if name == "k_proj" else seen.values
        if not torch.allclose(rearrange(kind[layer], "b head time dim -> b time (head dim)")[mask], output, atol=1e-3):
            raise ValueError(
                f"init: fit sets {name}, but what attention sees in layer {layer} of {type(student).__name__} is not its "
                "output (a norm stands behind it); leave out init"
            )


def _projections(student: nn.Module, layers: int) -> list[tuple[int, str, nn.Linear]]:
    """(layer, name, module) of all key and value projections."""
    found: list[Any] = [
        (module.layer_idx, name, getattr(module, name))
        for module in student.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        for name in ("k_proj", "v_proj")
        if isinstance(getattr(module, name, None), nn.Linear)
    ]
    if len(found) != 2 * layers:
        raise ValueError(
            f"init: fit needs linear layers k_proj and v_proj in each of the {layers} layers of {type(student).__name__}; "
            f"{len(found)} were found. Leave out init"
        )
    return found


def _setting(
    goal: Float[Tensor, "row out"],
    mask: Bool[Tensor, "batch time"],
    penalty: float,
    given: dict[tuple[int, str], Tensor],
    place: tuple[int, str],
) -> Callable[[nn.Linear, tuple[Tensor], Tensor], Tensor]:
    """A hook that sets its module by the inputs that it gets, notes what it gives of the rows, and gives it."""

    def set_weights(module: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        rows = inputs[0][mask].double()
        missing = goal.to(rows) - output[mask].double()
        if module.bias is not None:
            rows = nn.functional.pad(rows, (0, 1), value=1.0)
        gram = rows.T @ rows / len(rows)
        gram.diagonal().add_(penalty * gram.diagonal().mean())
        change = torch.linalg.solve(gram, rows.T @ missing / len(rows))
        if module.bias is not None:
            module.bias.add_(change[-1].to(module.bias))
            change = change[:-1]
        module.weight.add_(change.T.to(module.weight))
        new = nn.functional.linear(inputs[0], module.weight, module.bias)
        given[place] = new[mask]
        return new

    return set_weights

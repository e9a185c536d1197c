"""A student sharded over the processes of a cell (torch's FSDP): each holds its part of weights, gradients and moments.

A layer's weights are gathered for its forward and its backward, so recorded keys and values are those of the whole. Torch's
`fully_shard` is called, and not through accelerate, whose state makes FSDP of processes on GPUs alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator


def shard(student: nn.Module, accelerator: Accelerator) -> None:
    """Shard a student in place: a unit for each layer, one for embeddings, last norm and head, which stay gathered from the
    forward to the backward, where the loss makes its logits of the head."""
    from torch.distributed.fsdp import fully_shard

    names = set(getattr(student, "_no_split_modules", None) or ())
    for module in [*(module for module in student.modules() if type(module).__name__ in names), student]:
        unit: Any = fully_shard(module)
        # gloo knows no mean
        unit.set_force_sum_reduction_for_comms(accelerator.device.type == "cpu")
    if accelerator.mixed_precision != "no":  # as accelerate does for a student that it wraps
        own = student.forward

        @functools.wraps(own)
        def forward(*args: Any, **options: Any) -> Any:
            with accelerator.autocast():
                return own(*args, **options)

        student.forward = forward  # type: ignore[method-assign]


@contextmanager
def unreduced(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Gradients inside are this process's own: those of micro-batches before the last."""
    if not is_sharded(model):
        with accelerator.no_sync(model):
            yield
        return
    sharded: Any = model
    sharded.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        sharded.set_requires_gradient_sync(True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been called for it."""
    return hasattr(model, "set_requires_gradient_sync")


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, of which each process may hold a part; all processes call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    # every process has the whole: nothing is sent
    return distribute_tensor(tensor.to(like.device), mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def without_weights(student: nn.Module) -> nn.Module:
    """The same module without memory for its weights, made before it is sharded."""
    parameters = student.parameters()
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in parameters}
    return copy.deepcopy(student, dict(empty))


def whole_student(student: nn.Module, empty: nn.Module, main: bool) -> nn.Module:
    """The trained student in one piece on the main process's host; all processes call it, the others get `empty` back."""
    found: dict[str, Tensor] = {}
    gathered_as: dict[int, str] = {}  # tied weights are gathered once
    shared = dict(student.named_parameters(remove_duplicate=False))
    for name, tensor in student.state_dict().items():
        first = gathered_as.setdefault(id(shared.get(name, tensor)), name)
        found[name] = found[first] if first in found else gathered(tensor.detach()).cpu()
    if main:
        empty.load_state_dict(found, assign=True)
    return empty

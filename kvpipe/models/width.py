"""A narrower model: the heads and channels that say most on some texts (Minitron, arXiv:2407.14679)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kvpipe.data.batches import Batch

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("up_proj", "down_proj")


@torch.no_grad()
def narrow(model: Any, batches: list[Batch], heads: int | None, channels: int | None) -> list[dict[str, list[int]]]:
    """Leave every layer so many KV heads, with the query heads that read them, and channels of its MLP, in place.

    Those stay whose activations are largest over the batches: of a head the norm of its output, of a channel its
    magnitude, each as the next projection is given it.

    Args:
        model: a causal language model whose layers have projections named as Llama's.
        batches: texts.
        heads: KV heads that are kept; none keeps all.
        channels: of an MLP; the same.

    Returns:
        Of every layer, numbers of the `heads` and `channels` that stay.

    Raises:
        ValueError: the model has fewer, or no such projections.
    """
    config = model.config.get_text_config(decoder=True)
    of, dim = (
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or (config.hidden_size // config.num_attention_heads),
    )
    group = config.num_attention_heads // of
    attention = _holding(model, ATTENTION, config) if heads is not None else []
    mlp = _holding(model, MLP, config) if channels is not None else []
    for what, asked, there in (("heads", heads, of), ("channels", channels, config.intermediate_size)):
        if asked is not None and asked > there:
            raise ValueError(f"models: {what}: {asked} of {there} that the model has; ask for no more")
    sums = _activations(model, batches, [m.o_proj for m in attention], [m.down_proj for m in mlp], group * dim)
    kept: list[dict[str, list[int]]] = [{} for _ in range(config.num_hidden_layers)]
    for layer, module in zip(kept, attention, strict=False):
        assert heads is not None
        rows = _largest(sums[module.o_proj], heads)
        layer["heads"] = rows.tolist()
        for linear, width in ((module.q_proj, group * dim), (module.k_proj, dim), (module.v_proj, dim)):
            _cut(linear, _spread(rows, width), 0)
        _cut(module.o_proj, _spread(rows, group * dim), 1)
    for layer, module in zip(kept, mlp, strict=False):
        assert channels is not None
        rows = _largest(sums[module.down_proj], channels)
        layer["channels"] = rows.tolist()
        for name in ("gate_proj", "up_proj"):
            if hasattr(module, name):
                _cut(getattr(module, name), rows, 0)
        _cut(module.down_proj, rows, 1)
    if heads is not None:
        config.num_key_value_heads, config.num_attention_heads, config.head_dim = heads, heads * group, dim
    if channels is not None:
        config.intermediate_size = channels
    return kept


def _holding(model: nn.Module, names: tuple[str, ...], config: Any) -> list[Any]:
    """The module of every layer that has these projections."""
    found = [m for m in model.modules() if all(isinstance(getattr(m, name, None), nn.Linear) for name in names)]
    if len(found) != config.num_hidden_layers:
        raise ValueError(
            f"model type {config.model_type!r}: {len(found)} of {config.num_hidden_layers} layers have {', '.join(names)}, "
            "of which heads and channels could be taken; prune layers alone"
        )
    return found


def _activations(
    model: nn.Module, batches: list[Batch], outputs: list[nn.Linear], downs: list[nn.Linear], width: int
) -> dict[nn.Module, Tensor]:
    """Norms of heads and magnitudes of channels before the given projections, summed over all tokens."""
    sums: dict[nn.Module, Tensor] = {}
    mask: Float[Tensor, "token"] | Tensor = torch.empty(0)

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0][mask].float()
        sizes = rows.abs() if module in downs else rows.unflatten(-1, (-1, width)).norm(dim=-1)
        sums[module] = sums.get(module, torch.zeros((), device=rows.device)) + sizes.sum(0)

    handles = [module.register_forward_pre_hook(note) for module in (*outputs, *downs)]
    device = next(model.parameters()).device
    for batch in (batch.to(device) for batch in batches):
        mask = batch.mask
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


def _largest(sizes: Tensor, count: int) -> Tensor:
    return sizes.topk(count).indices.sort().values


def _spread(rows: Tensor, width: int) -> Tensor:
    """Places of blocks of some width."""
    return (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten()


def _cut(linear: nn.Linear, kept: Tensor, axis: int) -> None:
    linear.weight = nn.Parameter(linear.weight.index_select(axis, kept).contiguous())
    linear.out_features, linear.in_features = linear.weight.shape
    if linear.bias is not None and axis == 0:
        linear.bias = nn.Parameter(linear.bias[kept].clone())

"""Fusion: one target from the aligned caches of several teachers (spec 3.7).

Every fusion is a module with one interface: `Targets` in, `Fused` out. A kind only says how much it prefers each
teacher (`Fusion.preference`, in log space); masking of missing teachers, normalisation and the weighted sum are the
same for all. Targets must share one space before they are fused (spec section 4): sums of unrelated bases interfere.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvpipe.models.likelihood import wide


@runtime_checkable
class Caches(Protocol):
    """Anything with the aligned keys and values of all teachers, ``(teacher, layer, batch, head, time, dim)``."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Targets:
    """Aligned caches of all teachers in the student's shape."""

    keys: Float[Tensor, "teacher layer batch head time dim"]
    values: Float[Tensor, "teacher layer batch head time value_dim"]


@dataclass(frozen=True)
class Fused:
    """One target, and how much of each teacher is in it.

    `weights` broadcasts against ``(teacher, layer, batch, head, time)`` (an axis that a kind does not use is 1 long)
    and sums to 1 over teachers, except where no teacher is present: there the weights and the target are 0.
    """

    keys: Float[Tensor, "layer batch head time dim"]
    values: Float[Tensor, "layer batch head time value_dim"]
    weights: Float[Tensor, "teacher layers batch heads times"]


class Fusion(nn.Module):
    """The interface. `present` is ``(teacher, batch)``, or ``(teacher, batch, time)`` where alignment left holes."""

    def forward(
        self,
        targets: Caches,
        *,
        present: Bool[Tensor, "teacher batch"] | Bool[Tensor, "teacher batch time"] | None = None,
        tasks: Sequence[str] | None = None,
        queries: Float[Tensor, "layer batch query_head time dim"] | None = None,
        hidden: Float[Tensor, "layer batch time hidden"] | None = None,
        teacher_losses: Float[Tensor, "teacher batch"] | None = None,
    ) -> Fused:
        """Fuses; a kind raises `ValueError` without what it needs of `tasks`, `queries`, `hidden`, `teacher_losses`."""
        teachers, _, batch = targets.keys.shape[:3]
        if present is None:
            present = torch.ones(teachers, batch, dtype=torch.bool, device=targets.keys.device)
        if present.shape[:2] != (teachers, batch):
            raise ValueError(
                f"present is {tuple(present.shape)}; the targets have {teachers} teachers and {batch} examples: "
                f"expected ({teachers}, {batch}) or ({teachers}, {batch}, time)"
            )
        preference = self.preference(
            targets, tasks=tasks, queries=queries, hidden=hidden, teacher_losses=teacher_losses
        )
        if len(preference) != teachers:
            raise ValueError(
                f"{type(self).__name__} was built for {len(preference)} teachers; the targets have {teachers}"
            )
        mask = _over_cache(present)
        weights = self.weigh(preference, mask)
        return Fused(_mix(targets.keys, weights, mask), _mix(targets.values, weights, mask), weights)

    def preference(self, targets: Caches, **context: Any) -> Float[Tensor, "teacher layers batch heads times"]:
        """Log-weights up to a constant over teachers; −inf is weight 0."""
        raise NotImplementedError

    def weigh(self, preference: Tensor, mask: Tensor) -> Tensor:
        """Weights over the teachers present: their softmax."""
        return masked_softmax(preference, mask)


class MeanFusion(Fusion):
    """The same weight for every teacher that is present."""

    def preference(self, targets: Caches, **context: Any) -> Tensor:
        """Zeros."""
        return wide(targets.keys.new_zeros(len(targets.keys), 1, targets.keys.shape[2], 1, 1))


class FixedFusion(Fusion):
    """One given weight per teacher."""

    log_weights: Tensor

    def __init__(self, weights: Sequence[float | int]):
        super().__init__()
        self.register_buffer("log_weights", _log_row(weights, "fixed"))

    def preference(self, targets: Caches, **context: Any) -> Tensor:
        """The logarithm of the given weights."""
        batch = targets.keys.shape[2]
        return rearrange(self.log_weights.expand(batch, -1), "batch teacher -> teacher 1 batch 1 1")


class TaskFusion(Fusion):
    """A row of weights per task, e.g. ``{"math": [0.7, 0.3], "code": [0.3, 0.7], "default": [0.5, 0.5]}``.

    A task without a row takes ``default``; without that row it is an error. With `learnable`, each row trains an
    offset to its log-weights, begun at 0; a weight of 0 stays 0.
    """

    log_weights: Tensor

    def __init__(self, weights: Mapping[str, Sequence[float | int]], learnable: bool = False):
        super().__init__()
        if not weights:
            raise ValueError("task fusion needs a table of weights, task: [one weight per teacher]")
        if len({len(row) for row in weights.values()}) > 1:
            lengths = {task: len(row) for task, row in weights.items()}
            raise ValueError(f"task fusion needs one weight per teacher in every row; got rows of length {lengths}")
        self.tasks = {task: number for number, task in enumerate(weights)}
        self.register_buffer("log_weights", torch.stack([_log_row(row, task) for task, row in weights.items()]))
        self.offsets = nn.Parameter(torch.zeros_like(self.log_weights)) if learnable else None

    def preference(self, targets: Caches, *, tasks: Sequence[str] | None = None, **context: Any) -> Tensor:
        """Each example's row of the table."""
        if tasks is None:
            raise ValueError("task fusion needs `tasks`, the task's name of every example")
        if len(tasks) != targets.keys.shape[2]:
            raise ValueError(f"{len(tasks)} tasks came for {targets.keys.shape[2]} examples")
        unknown = sorted(set(tasks) - set(self.tasks))
        if unknown and "default" not in self.tasks:
            raise ValueError(
                f"no fusion weights for task {', '.join(unknown)}; known tasks: {', '.join(self.tasks)}. "
                "Add a row for it, or a row `default`"
            )
        table = self.log_weights if self.offsets is None else self.log_weights + self.offsets
        rows = [self.tasks[task] if task in self.tasks else self.tasks["default"] for task in tasks]
        return rearrange(table[rows], "batch teacher -> teacher 1 batch 1 1")


class AttentionFusion(Fusion):
    """Per layer, KV head and position: softmax over teachers of ``query · key / sqrt(dim)``.

    The queries of a KV head's group are averaged first, which for the scores is the same as averaging the scores over
    the group. Queries and keys are both taken before rotation: at one position rotation would cancel. Queries are
    detached, so that the student cannot move the target towards itself.
    """

    def preference(self, targets: Caches, *, queries: Tensor | None = None, **context: Any) -> Tensor:
        """The scaled scores."""
        if queries is None:
            raise ValueError(
                "attention fusion needs `queries`, the student's queries (layer, batch, query_head, time, dim)"
            )
        heads, dim = targets.keys.shape[3], targets.keys.shape[5]
        if queries.shape[2] % heads or queries.shape[4] != dim:
            raise ValueError(
                f"queries {tuple(queries.shape)} do not fit keys {tuple(targets.keys.shape)}: query heads must be a "
                f"multiple of {heads} KV heads and dim must be {dim}"
            )
        grouped = reduce(
            wide(queries.detach()), "layer batch (head group) time dim -> layer batch head time dim", "mean", head=heads
        )
        return torch.stack([(grouped * wide(keys)).sum(-1) for keys in targets.keys]) * dim**-0.5


class LearnableFusion(Fusion):
    """Per layer and position: an MLP over the student's hidden state, shared by the layers, one output per teacher.

    LayerNorm → Linear → SiLU → Linear, the last begun at 0, so that training starts from the mean. The hidden state
    is detached: the router learns from it, it does not bend to the router.
    """

    def __init__(self, n_teachers: int, hidden_size: int, width: int = 64):
        super().__init__()
        last = nn.Linear(width, n_teachers)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.router = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.SiLU(), last)

    def preference(self, targets: Caches, *, hidden: Tensor | None = None, **context: Any) -> Tensor:
        """The router's logits."""
        if hidden is None:
            raise ValueError(
                "learnable fusion needs `hidden`, the student's hidden states (layer, batch, time, hidden)"
            )
        logits = self.router(hidden.detach())
        return rearrange(wide(logits), "layer batch time teacher -> teacher layer batch 1 time")


class SelectFusion(Fusion):
    """The teacher with the lowest loss on the example, among those present; equal losses share."""

    def preference(self, targets: Caches, *, teacher_losses: Tensor | None = None, **context: Any) -> Tensor:
        """The negated losses."""
        if teacher_losses is None:
            raise ValueError(
                "select fusion needs `teacher_losses`, each teacher's loss on each example (teacher, batch)"
            )
        if teacher_losses.isnan().any():
            raise ValueError(
                "select fusion got NaN in `teacher_losses`; say by `present` which teachers an example has"
            )
        return rearrange(-wide(teacher_losses.detach()), "teacher batch -> teacher 1 batch 1 1")

    def weigh(self, preference: Tensor, mask: Tensor) -> Tensor:
        """All weight on the best of the teachers present."""
        scores = preference.masked_fill(~mask, -torch.inf)
        best = mask & (scores == scores.amax(dim=0, keepdim=True))
        return masked_softmax(torch.zeros_like(scores), best)


KINDS: dict[str, type[Fusion]] = {
    "mean": MeanFusion,
    "fixed": FixedFusion,
    "task": TaskFusion,
    "attention": AttentionFusion,
    "learnable": LearnableFusion,
    "select": SelectFusion,
}


def build_fusion(kind: str, *, n_teachers: int, hidden_size: int | None = None, **options: Any) -> Fusion:
    """The fusion named `kind` (a key of `KINDS`) with its options; checks that weights fit the number of teachers."""
    if kind not in KINDS:
        raise ValueError(f"unknown fusion kind {kind!r}; known: {', '.join(KINDS)}")
    if kind == "learnable":
        if hidden_size is None:
            raise ValueError("learnable fusion needs hidden_size, the width of the student's hidden state")
        options |= {"n_teachers": n_teachers, "hidden_size": hidden_size}
    fusion = KINDS[kind](**options)
    table = getattr(fusion, "log_weights", None)
    if table is not None and table.shape[-1] != n_teachers:
        raise ValueError(f"{kind} fusion got {table.shape[-1]} weights per row for {n_teachers} teachers: one each")
    return fusion


def position_entropy(
    weights: Float[Tensor, "teacher layers batch heads times"], present: Bool[Tensor, "teacher batch ..."]
) -> tuple[Float[Tensor, "batch times"], Bool[Tensor, "batch times"]]:
    """Entropy of the weights over the teachers present, as a share of its maximum: 0 is one teacher, 1 is the mean.

    Averaged over layers and heads, and where at least two teachers are present: elsewhere it is 0. Differentiable.
    """
    counts = _over_cache(present).sum(dim=0).to(weights.dtype)
    nats = -torch.xlogy(weights, weights.clamp(min=torch.finfo(weights.dtype).tiny)).sum(dim=0)
    share = reduce(nats / counts.clamp(min=2).log(), "layers batch heads times -> batch times", "mean")
    share, several = torch.broadcast_tensors(share, counts[0, :, 0] >= 2)
    return share.masked_fill(~several, 0), several


def entropy(
    weights: Float[Tensor, "teacher layers batch heads times"], present: Bool[Tensor, "teacher batch ..."]
) -> Tensor:
    """Mean of `position_entropy` over all positions with at least two teachers (0 if there are none).

    Adding ``−γ · entropy`` to the loss keeps learned weights from collapsing onto one teacher.
    """
    share, several = position_entropy(weights, present)
    return share.sum() / several.sum().clamp(min=1)


@dataclass(frozen=True)
class Collapse:
    """What a router does: `state` is "ok", "collapsed" (one teacher takes it all) or "uniform" (it never chose)."""

    state: Literal["ok", "collapsed", "uniform"]
    mean_weights: list[float]
    entropy: float
    message: str


def collapse_report(
    weights: Float[Tensor, "teacher layers batch heads times"],
    present: Bool[Tensor, "teacher batch ..."],
    limit: float | int = 0.98,
    tolerance: float | int = 0.01,
) -> Collapse:
    """Judges a router's weights over some batches, and warns.

    Collapsed: where there is a choice (two teachers or more), one teacher's mean weight is above `limit`. Uniform: no
    weight is further than `tolerance` from the mean fusion's. For a learned router only: a weight table may say
    either on purpose.
    """
    mask = _over_cache(present)
    counts = mask.sum(dim=0)
    mask, weights, counts = torch.broadcast_tensors(mask, weights.detach().float(), counts.unsqueeze(0))
    choice = counts >= 2
    share = float(entropy(weights, present))
    means = (weights * choice).flatten(1).sum(1) / choice[0].sum().clamp(min=1)
    distance = float(((weights - mask / counts.clamp(min=1)) * choice).abs().amax())
    state: Literal["ok", "collapsed", "uniform"] = "ok"
    message = f"mean weights {[round(w, 3) for w in means.tolist()]}, entropy {share:.3f} of its maximum"
    if choice.any() and float(means.amax()) > limit:
        state = "collapsed"
        message = f"fusion collapsed onto teacher {int(means.argmax())}: {message}. Raise the entropy term's weight"
    elif choice.any() and distance < tolerance:
        state = "uniform"
        message = f"fusion stayed uniform: {message}. Train it longer or raise its learning rate, or use the mean"
    if state != "ok":
        warnings.warn(message, stacklevel=2)
    return Collapse(state, means.tolist(), share, message)


def mean_weights(
    weights: Float[Tensor, "teacher layers batch heads times"], tasks: Sequence[str], mask: Bool[Tensor, "batch time"]
) -> dict[str, Float[Tensor, "layers teacher"]]:
    """Mean weight of each teacher in each layer, per task, over the unmasked positions: what the report draws."""
    shown = rearrange(mask, "batch time -> 1 1 batch 1 time")
    every, shown = torch.broadcast_tensors(wide(weights.detach()), shown)
    result = {}
    for task in dict.fromkeys(tasks):
        rows = torch.tensor([number for number, name in enumerate(tasks) if name == task], device=weights.device)
        here, kept = every.index_select(2, rows), shown.index_select(2, rows)
        total = (here * kept).sum(dim=(2, 3, 4)) / kept.sum(dim=(2, 3, 4)).clamp(min=1)
        result[task] = rearrange(total, "teacher layer -> layer teacher")
    return result


def masked_softmax(
    logits: Float[Tensor, "teacher ..."], mask: Bool[Tensor, "teacher ..."]
) -> Float[Tensor, "teacher ..."]:
    """Softmax over the first axis among the True entries of `mask` (broadcast); all 0 where there are none."""
    masked = logits.masked_fill(~mask, -torch.inf)
    top = masked.detach().amax(dim=0, keepdim=True)
    scaled = (masked - top.masked_fill(top == -torch.inf, 0)).exp()
    return scaled / scaled.sum(dim=0, keepdim=True).clamp(min=torch.finfo(scaled.dtype).tiny)


def _over_cache(present: Tensor) -> Tensor:
    """``(teacher, batch[, time])`` against ``(teacher, layer, batch, head, time)``."""
    if present.ndim == 2:
        return rearrange(present, "teacher batch -> teacher 1 batch 1 1")
    return rearrange(present, "teacher batch time -> teacher 1 batch 1 time")


def _mix(caches: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
    """Σ over teachers, one at a time: no second tensor of all the caches is made."""
    total = caches.new_zeros(())
    for cache, weight, here in zip(caches, weights.to(caches.dtype), mask, strict=True):
        # What a missing teacher left behind may be anything, NaN too, and NaN · 0 is NaN.
        shown = cache if bool(here.all()) else cache.masked_fill(~here.unsqueeze(-1), 0)
        total = torch.addcmul(total, shown, weight.unsqueeze(-1))
    return total


def _log_row(weights: Sequence[float | int], name: str) -> Tensor:
    row = torch.tensor([float(weight) for weight in weights], dtype=torch.float64)
    if not len(row) or (row < 0).any() or not torch.isfinite(row).all() or row.sum() <= 0:
        raise ValueError(f"fusion weights of {name!r} must be finite, not negative and not all 0; got {list(weights)}")
    return (row / row.sum()).log().float()

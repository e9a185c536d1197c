"""Fusion: one target from the aligned caches of several teachers.

Every fusion is a module with one interface: `TeacherCaches` in, `Fused` out. A kind only says how much it prefers each
teacher (`Fusion.preference`, in log space); masking of missing teachers, normalisation and the weighted sum are the
same for all. Targets must share one space before they are fused: sums of unrelated bases interfere.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kvpipe.config import FUSIONS
from kvpipe.config.fusions import (
    AgreementFusionConfig,
    AttentionFusionConfig,
    FixedFusionConfig,
    LearnableFusionConfig,
    MeanFusionConfig,
    SelectFusionConfig,
    SimilarityFusionConfig,
    TaskFusionConfig,
)
from kvpipe.models.likelihood import wide


@dataclass(frozen=True)
class TeacherCaches:
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
    """The interface. `present` is ``(teacher, batch)``, or ``(teacher, batch, time)`` where alignment left holes.

    A kind says in its settings what it `needs` of a batch, and is built from them by `of`.
    """

    @classmethod
    def of(cls, settings: Any, teachers: int, hidden_size: int) -> Fusion:
        """From its settings, for so many teachers and a student of this width."""
        return cls()

    def begin(self, targets: TeacherCaches, present: Bool[Tensor, "teacher batch time"]) -> None:
        """A first look at the targets of some training examples, where the settings need `prototypes`."""

    def prior(self, teachers: int, tasks: Sequence[str]) -> Float[Tensor, "teacher batch"]:
        """Log-weights of kinds whose weights are known before any cache is."""
        raise ValueError(f"{type(self).__name__} weighs teachers by their caches, and knows no weights without them")

    def forward(
        self,
        targets: TeacherCaches,
        *,
        present: Bool[Tensor, "teacher batch"] | Bool[Tensor, "teacher batch time"] | None = None,
        tasks: Sequence[str] | None = None,
        queries: Float[Tensor, "layer batch query_head time dim"] | None = None,
        hidden: Float[Tensor, "layer batch time hidden"] | None = None,
        teacher_losses: Float[Tensor, "teacher batch"] | None = None,
        span_losses: Float[Tensor, "teacher batch time"] | None = None,
    ) -> Fused:
        """Fuses; a kind raises `ValueError` without what it needs of the keyword arguments."""
        teachers, _, batch = targets.keys.shape[:3]
        if present is None:
            present = torch.ones(teachers, batch, dtype=torch.bool, device=targets.keys.device)
        if present.shape[:2] != (teachers, batch):
            raise ValueError(
                f"present is {tuple(present.shape)}; the targets have {teachers} teachers and {batch} examples: "
                f"expected ({teachers}, {batch}) or ({teachers}, {batch}, time)"
            )
        preference = self.preference(
            targets,
            present=present,
            tasks=tasks,
            queries=queries,
            hidden=hidden,
            teacher_losses=teacher_losses,
            span_losses=span_losses,
        )
        if len(preference) != teachers:
            raise ValueError(
                f"{type(self).__name__} was built for {len(preference)} teachers; the targets have {teachers}"
            )
        mask = _over_cache(present)
        weights = self.weigh(preference, mask)
        return Fused(_mix(targets.keys, weights, mask), _mix(targets.values, weights, mask), weights)

    def preference(self, targets: TeacherCaches, **context: Any) -> Float[Tensor, "teacher layers batch heads times"]:
        """Log-weights up to a constant over teachers; −inf is weight 0."""
        raise NotImplementedError

    def weigh(self, preference: Tensor, mask: Tensor) -> Tensor:
        """Weights over the teachers present: their softmax."""
        return masked_softmax(preference, mask)


class KnownFusion(Fusion):
    """Kinds whose weights follow from the example's task alone."""

    def preference(self, targets: TeacherCaches, *, tasks: Sequence[str] | None = None, **context: Any) -> Tensor:
        """The log-weights of each example."""
        tasks = [""] * targets.keys.shape[2] if tasks is None else tasks
        if len(tasks) != targets.keys.shape[2]:
            raise ValueError(f"{len(tasks)} tasks came for {targets.keys.shape[2]} examples")
        prior = self.prior(len(targets.keys), tasks).to(wide(targets.keys[:0]))
        return rearrange(prior, "teacher batch -> teacher 1 batch 1 1")


@FUSIONS.built_from(MeanFusionConfig)
class MeanFusion(KnownFusion):
    """The same weight for every teacher that is present."""

    def prior(self, teachers: int, tasks: Sequence[str]) -> Tensor:
        """Zeros."""
        return torch.zeros(teachers, len(tasks))


@FUSIONS.built_from(FixedFusionConfig)
class FixedFusion(KnownFusion):
    """One given weight per teacher."""

    log_weights: Tensor

    def __init__(self, weights: Sequence[float | int]):
        super().__init__()
        self.register_buffer("log_weights", _log_row(weights, "fixed"))

    @classmethod
    def of(cls, settings: FixedFusionConfig, teachers: int, hidden_size: int) -> Fusion:
        """With the weights that are set."""
        return cls(_as_many(settings.weights, teachers))

    def prior(self, teachers: int, tasks: Sequence[str]) -> Tensor:
        """The logarithm of the given weights."""
        return self.log_weights[:, None].expand(-1, len(tasks))


@FUSIONS.built_from(TaskFusionConfig)
class TaskFusion(KnownFusion):
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

    @classmethod
    def of(cls, settings: TaskFusionConfig, teachers: int, hidden_size: int) -> Fusion:
        """With the table that is set."""
        return cls({task: _as_many(row, teachers) for task, row in settings.weights.items()}, settings.offsets)

    def preference(self, targets: TeacherCaches, *, tasks: Sequence[str] | None = None, **context: Any) -> Tensor:
        """Each example's row of the table."""
        if tasks is None:
            raise ValueError("task fusion needs `tasks`, the task's name of every example")
        return super().preference(targets, tasks=tasks)

    def prior(self, teachers: int, tasks: Sequence[str]) -> Tensor:
        """Each example's row of the table."""
        unknown = sorted(set(tasks) - set(self.tasks))
        if unknown and "default" not in self.tasks:
            raise ValueError(
                f"no fusion weights for task {', '.join(unknown)}; known tasks: {', '.join(self.tasks)}. "
                "Add a row for it, or a row `default`"
            )
        table = self.log_weights if self.offsets is None else self.log_weights + self.offsets
        return table[[self.tasks[task] if task in self.tasks else self.tasks["default"] for task in tasks]].T


@FUSIONS.built_from(AttentionFusionConfig)
class AttentionFusion(Fusion):
    """Per layer, KV head and position: softmax over teachers of ``query · key / sqrt(dim)``.

    The queries of a KV head's group are averaged first, which for the scores is the same as averaging the scores over
    the group. Queries and keys are both taken before rotation: at one position rotation would cancel. Queries are
    detached, so that the student cannot move the target towards itself.
    """

    def preference(self, targets: TeacherCaches, *, queries: Tensor | None = None, **context: Any) -> Tensor:
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


@FUSIONS.built_from(LearnableFusionConfig)
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

    @classmethod
    def of(cls, settings: LearnableFusionConfig, teachers: int, hidden_size: int) -> Fusion:
        """A router begun at the mean."""
        return cls(teachers, hidden_size)

    def preference(self, targets: TeacherCaches, *, hidden: Tensor | None = None, **context: Any) -> Tensor:
        """The router's logits."""
        if hidden is None:
            raise ValueError(
                "learnable fusion needs `hidden`, the student's hidden states (layer, batch, time, hidden)"
            )
        logits = self.router(hidden.detach())
        return rearrange(wide(logits), "layer batch time teacher -> teacher layer batch 1 time")


@FUSIONS.built_from(SelectFusionConfig)
class SelectFusion(Fusion):
    """The teacher with the lowest loss, among those present, on the example or on each student token's bytes.

    Equal losses share.
    """

    def __init__(self, per: Literal["example", "span"] = "example"):
        super().__init__()
        self.per = per

    @classmethod
    def of(cls, settings: SelectFusionConfig, teachers: int, hidden_size: int) -> Fusion:
        """Per example or per span, as set."""
        return cls(settings.per)

    def preference(
        self,
        targets: TeacherCaches,
        *,
        teacher_losses: Tensor | None = None,
        span_losses: Tensor | None = None,
        **context: Any,
    ) -> Tensor:
        """The negated losses."""
        losses = teacher_losses if self.per == "example" else span_losses
        if losses is None:
            name, axes = ("teacher_losses", "batch") if self.per == "example" else ("span_losses", "batch, time")
            raise ValueError(f"select fusion per {self.per} needs `{name}`, each teacher's loss (teacher, {axes})")
        if losses.isnan().any():
            raise ValueError("select fusion got NaN for a loss; say by `present` which teachers an example has")
        return _over_cache(-wide(losses.detach()))

    def weigh(self, preference: Tensor, mask: Tensor) -> Tensor:
        """All weight on the best of the teachers present."""
        scores = preference.masked_fill(~mask, -torch.inf)
        best = mask & (scores == scores.amax(dim=0, keepdim=True))
        return masked_softmax(torch.zeros_like(scores), best)


@FUSIONS.built_from(SimilarityFusionConfig)
class SimilarityFusion(Fusion):
    """Softmax over teachers of the cosine, over τ, of an example's mean target to the teacher's prototype.

    The prototype is the mean target of a first look at some training examples (`begin`), layer by layer: a teacher counts
    for more on an example that looks like its usual ones.
    """

    prototypes: Tensor

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("prototypes", torch.zeros(0))

    @classmethod
    def of(cls, settings: SimilarityFusionConfig, teachers: int, hidden_size: int) -> Fusion:
        """At the temperature that is set."""
        return cls(settings.temperature)

    @torch.no_grad()
    def begin(self, targets: TeacherCaches, present: Tensor) -> None:
        """Prototypes, `(teacher, layer, feature)`: means over all positions of all examples that have a target."""
        means, counts = self._means(targets, present)
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        self.prototypes = (means * rearrange(shares, "teacher batch -> teacher 1 batch 1")).sum(2)

    def preference(self, targets: TeacherCaches, *, present: Tensor | None = None, **context: Any) -> Tensor:
        """Cosines over the temperature."""
        if not len(self.prototypes):
            raise ValueError("similarity fusion needs a first look at the targets: call `begin` once")
        if present is None:
            present = torch.ones(*targets.keys.shape[:1], *targets.keys.shape[2:3], dtype=torch.bool)
        means, _ = self._means(targets, present)
        cosine = torch.cosine_similarity(means, self.prototypes.to(means)[:, :, None], dim=-1)
        return rearrange(cosine.mean(1) / self.temperature, "teacher batch -> teacher 1 batch 1 1")

    @staticmethod
    def _means(targets: TeacherCaches, present: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values side by side, averaged over each example's positions with a target, and how many these are."""
        if present.ndim == 2:
            present = present[..., None].expand(-1, -1, targets.keys.shape[4])
        counts = present.sum(-1)
        shown = rearrange(present.to(targets.keys.device), "teacher batch time -> teacher 1 batch 1 time 1")
        sums = [
            rearrange(
                wide(x).masked_fill(~shown, 0).sum(4), "teacher layer batch head dim -> teacher layer batch (head dim)"
            )
            for x in (targets.keys.detach(), targets.values.detach())
        ]
        return torch.cat(sums, -1) / counts[:, None, :, None].clamp(min=1), counts.to(sums[0])


@FUSIONS.built_from(AgreementFusionConfig)
class AgreementFusion(Fusion):
    """Per layer and position, softmax over teachers of the mean cosine, over τ, to the other teachers' targets.

    Two teachers agree with each other equally; from three on, one that stands apart counts for less.
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        self.temperature = temperature

    @classmethod
    def of(cls, settings: AgreementFusionConfig, teachers: int, hidden_size: int) -> Fusion:
        """At the temperature that is set."""
        return cls(settings.temperature)

    @torch.no_grad()
    def preference(self, targets: TeacherCaches, *, present: Tensor | None = None, **context: Any) -> Tensor:
        """Mean cosines over the temperature; 0 for a teacher without others."""
        if present is None:
            present = torch.ones(*targets.keys.shape[:1], *targets.keys.shape[2:3], dtype=torch.bool)
        shown = _over_cache(present.to(targets.keys.device)).to(wide(targets.keys[:0]).dtype)
        both = [
            rearrange(wide(x), "teacher layer batch head time dim -> teacher layer batch time (head dim)")
            for x in (targets.keys, targets.values)
        ]
        unit = torch.nn.functional.normalize(torch.cat(both, -1), dim=-1)
        here = rearrange(shown, "teacher 1 batch 1 time -> teacher 1 batch time")
        unit = unit.masked_fill(here[..., None] == 0, 0)
        others = unit.sum(0, keepdim=True) - unit
        count = (here.sum(0, keepdim=True) - here).clamp(min=1)
        cosine = (unit * others).sum(-1) / count
        return rearrange(cosine / self.temperature, "teacher layer batch time -> teacher layer batch 1 time")


def build_fusion(settings: Any, teachers: int, hidden_size: int = 0) -> Fusion:
    """The fusion of some settings, `FUSIONS(kind, …)`.

    Args:
        settings: its kind's.
        teachers: how many are fused.
        hidden_size: the student's width, which `learnable` reads.
    """
    return FUSIONS.of(settings).of(settings, teachers, hidden_size)


def _as_many(row: Sequence[float], teachers: int) -> Sequence[float]:
    if len(row) != teachers:
        raise ValueError(f"fusion got {len(row)} weights for {teachers} teachers: one each")
    return row


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

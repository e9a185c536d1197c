"""Losses, unreduced: one number per example and position, 0 where masked.

Everything here is a pure function; `kvpipe.distill.terms` makes terms of them, whose weights come from `Schedule`.
All losses are computed in float32, or in float64 where an input is. A batch may come in parts (micro-batches,
processes): a part's loss is its `masked_sum` over the count of the whole batch, scaled by `pooled_std` of all parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Integer, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kvpipe.experiment.sizes import LEAST
from kvpipe.models.head import Head
from kvpipe.models.likelihood import wide


def kv_loss(
    student: Float[Tensor, "*layer batch head time dim"],
    target: Float[Tensor, "*layer batch head time dim"],
    mask: Shaped[Tensor, "batch time"],
    kind: Literal["mse", "smooth_l1", "cosine"] = "mse",
    scale: Literal["std"] | Tensor | None = None,
) -> Float[Tensor, "batch time"]:
    """Squared, smooth-L1 (β = 1) or cosine (1 − cos of each head's vectors, without scale) distance of caches, averaged
    over layer, head and dim.

    `mask` is nonzero where a position counts; what stands in masked positions of either side, NaN too, has no
    influence on the loss, its gradient or the scale. With ``scale="std"`` each layer's residual is divided by the
    standard deviation of its target over the unmasked positions, detached, so that no layer dominates. A layer whose
    target is constant there has no such scale and is left as it is. A part of a batch is given the whole's deviations
    as ``scale``, one per layer.
    """
    return layer_kv_losses(student, target, mask, kind, scale).reshape(-1, *mask.shape).mean(0)


def layer_kv_losses(
    student: Float[Tensor, "*layer batch head time dim"],
    target: Float[Tensor, "*layer batch head time dim"],
    mask: Shaped[Tensor, "batch time"],
    kind: Literal["mse", "smooth_l1", "cosine"] = "mse",
    scale: Literal["std"] | Tensor | None = None,
) -> Float[Tensor, "*layer batch time"]:
    """`kv_loss` of each layer by itself."""
    if kind == "cosine":
        hidden = rearrange(mask == 0, "batch time -> batch 1 time 1")
        own, other = (wide(x).masked_fill(hidden, 1) for x in (student, target))
        return reduce(1 - F.cosine_similarity(own, other, dim=-1), "... batch head time -> ... batch time", "mean")
    if kind not in ("mse", "smooth_l1"):
        raise ValueError(f"kind must be 'mse', 'smooth_l1' or 'cosine'; got {kind!r}")
    if not isinstance(scale, Tensor) and scale not in (None, "std"):
        raise ValueError(f"scale must be None or 'std'; got {scale!r}")
    std = target_std(target, mask) if isinstance(scale, str) else scale
    return _Distance.apply(student, target, mask != 0, std, kind)  # type: ignore[no-untyped-call]


class _Distance(torch.autograd.Function):
    """Layer by layer, its gradient formed on the way: of whole caches there is one copy and not six."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, target: Tensor, shown: Tensor, std: Tensor | None, kind: str) -> Tensor:
        """The losses of every layer and position; 0 where nothing is shown."""
        hidden = rearrange(~shown, "batch time -> batch 1 time 1")
        ours, theirs = (x.reshape(-1, *x.shape[-4:]) for x in (student, target))
        units = torch.ones(len(ours)) if std is None else 1 / torch.where(std > 0, std, 1.0).flatten()
        number, count = torch.promote_types(wide(student[:0]).dtype, target.dtype), ours.shape[2] * ours.shape[4]
        losses = torch.empty(len(ours), *shown.shape, dtype=number, device=student.device)
        forms = any(ctx.needs_input_grad)
        gradient = torch.empty_like(ours, dtype=number if ctx.needs_input_grad[1] else student.dtype) if forms else None
        for layer, unit in enumerate(units.tolist()):
            # masked before anything else: 0 · NaN is NaN
            residual = (ours[layer].to(number) - theirs[layer]).masked_fill_(hidden, 0).mul_(unit)
            if kind == "mse":
                losses[layer] = residual.square().mean((1, 3))
                residual.mul_(2)
            else:
                losses[layer] = F.smooth_l1_loss(residual, torch.zeros_like(residual), reduction="none").mean((1, 3))
                residual.clamp_(-1, 1)
            if gradient is not None:
                gradient[layer] = residual.mul_(unit / count)
        ctx.save_for_backward(gradient)
        ctx.kinds = student.dtype, target.dtype, student.shape
        return losses.view(*student.shape[:-4], *shown.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_losses: Tensor) -> Any:
        """What the forward has formed, times what comes from above."""
        own, other, shape = ctx.kinds
        above = by_losses.reshape(-1, *by_losses.shape[-2:])
        gradient = (ctx.saved_tensors[0] * rearrange(above, "layer batch time -> layer batch 1 time 1")).view(shape)
        by_target = (-gradient).to(other) if ctx.needs_input_grad[1] else None
        return gradient.to(own) if ctx.needs_input_grad[0] else None, by_target, None, None, None


@torch.no_grad()
def target_moments(
    target: Float[Tensor, "*layer batch head time dim"], mask: Shaped[Tensor, "batch time"]
) -> Float[Tensor, "3 *layer"]:
    """Count, mean and summed squared deviation of each layer's target over the unmasked positions, heads and dims."""
    hidden = rearrange(mask == 0, "batch time -> batch 1 time 1")
    count = (mask != 0).sum() * target.shape[-3] * target.shape[-1]
    found = []
    for layer in target.reshape(-1, *target.shape[-4:]):
        values = wide(layer).masked_fill(hidden, 0)
        mean = values.sum() / count.clamp(min=1)
        found.append(torch.stack([count.to(mean), mean, values.sub_(mean).masked_fill_(hidden, 0).square().sum()]))
    return torch.stack(found, 1).reshape(3, *target.shape[:-4])


@torch.no_grad()
def pooled_std(moments: Float[Tensor, "part 3 *layer"]) -> Float[Tensor, "*layer"]:
    """The deviation of all parts together from each one's `target_moments`; 0 where the target is constant.

    Chan, Golub and LeVeque 1983: no difference of large sums, so parts of any size give the whole's deviation.
    """
    count, mean, squares = moments.unbind(1)
    total = count.sum(0).clamp(min=1)
    middle = (count * mean).sum(0) / total
    std = ((squares + count * (mean - middle).square()).sum(0) / total).sqrt()
    return torch.where(std <= 1e-6 * middle.abs(), 0.0, std)  # what rounding leaves of a constant


def target_std(
    target: Float[Tensor, "*layer batch head time dim"], mask: Shaped[Tensor, "batch time"]
) -> Float[Tensor, "*layer"]:
    """Standard deviation of each layer's target over the unmasked positions, heads and dims; 0 where it is constant."""
    return pooled_std(target_moments(target, mask)[None])


def masked_sum(values: Float[Tensor, "batch time"], mask: Shaped[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """The sum over unmasked tokens."""
    return values.masked_fill(mask == 0, 0).sum()


def masked_mean(values: Float[Tensor, "batch time"], mask: Shaped[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """The mean over unmasked tokens; 0 where there are none."""
    return masked_sum(values, mask) / (mask != 0).sum().clamp(min=1)


def relation_loss(
    student: Float[Tensor, "batch head time dim"],
    teacher: Float[Tensor, "batch src_head time src_dim"],
    mask: Shaped[Tensor, "batch time"],
    relation_heads: int,
) -> Float[Tensor, "batch time"]:
    """MiniLMv2 (arXiv:2012.15828, eqs. 3–5): KL(teacher ‖ student) of the self-relations of keys, or of values.

    Heads are concatenated and split anew into `relation_heads`; a relation is the softmax of ``x xᵀ / sqrt(d_r)``
    over the unmasked positions up to one's own (the models are causal). Only the time axis must agree, so neither
    heads nor dimensions need matching. The mean over relation heads, per position.
    """
    shown = mask != 0
    allowed = (
        rearrange(shown, "batch key -> batch 1 1 key")
        & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    )
    # A masked query still needs one finite entry, or its softmax is NaN; its loss is dropped below.
    allowed = allowed | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)

    def log_relation(x: Tensor, side: str) -> Tensor:
        width = x.shape[1] * x.shape[3]
        if width % relation_heads:
            raise ValueError(
                f"{side}: {x.shape[1]} heads of {x.shape[3]} do not divide into {relation_heads} relation heads"
            )
        flat = rearrange(wide(x), "batch head time dim -> batch time (head dim)").masked_fill(~shown[..., None], 0)
        split = rearrange(flat, "batch time (relation dim) -> batch relation time dim", relation=relation_heads)
        scores = split @ split.mT * split.shape[-1] ** -0.5
        return scores.masked_fill(~allowed, -torch.inf).log_softmax(-1)

    divergence = row_divergence(log_relation(student, "student"), log_relation(teacher, "teacher"))
    return divergence.mean(1).masked_fill(~shown, 0)


def row_divergence(
    student: Float[Tensor, "*row outcome"], teacher: Float[Tensor, "*row outcome"]
) -> Float[Tensor, "*row"]:
    """KL(teacher ‖ student) of log-probabilities; what is −∞ in both is no outcome."""
    none = teacher.isneginf() & student.isneginf()
    return (teacher.exp() * (teacher - student).masked_fill(none, 0)).sum(-1)


def logit_kd_loss(
    student_logits: Float[Tensor, "*row vocab"],
    top_ids: Integer[Tensor, "*row k"],
    top_logprobs: Float[Tensor, "*row k"],
    mask: Shaped[Tensor, "*row"],
    temperature: float | int = 1.0,
) -> Float[Tensor, "*row"]:
    """KL(teacher ‖ student) over the teacher's top tokens that the student has too, and one bucket for all the rest.

    `top_ids` are *student* ids, −1 where the student has no such token; `top_logprobs` are the teacher's
    log-probabilities at temperature 1. Logits and teacher entries at one position predict the same next token. What
    is not matched, on either side, is in the rest bucket, so both sides are proper distributions over k + 1 outcomes.
    Teacher tokens with one student id add up. The temperature acts on these k + 1 outcomes of both sides, and the loss
    is multiplied by its square so that gradients keep their size (Hinton et al. 2015).
    """
    shown = mask != 0
    ids, teacher = _merged(top_ids.long(), wide(top_logprobs))
    matched = ids >= 0
    log_student = wide(student_logits).log_softmax(-1).gather(-1, ids.clamp(min=0))
    sides = []
    for log_probs in (teacher, log_student):
        log_probs = log_probs.masked_fill(~matched, -torch.inf)
        rest = 1 - log_probs.exp().sum(-1, keepdim=True)
        buckets = torch.cat([log_probs, rest.clamp(min=1e-7).log()], dim=-1) / temperature
        sides.append(buckets.log_softmax(-1))
    exists = F.pad(matched, (0, 1), value=True)
    gap = (sides[0] - sides[1]).masked_fill(~exists, 0)
    divergence = (sides[0].exp() * gap).sum(-1) * temperature**2
    return divergence.masked_fill(~shown, 0)


def _merged(
    ids: Integer[Tensor, "*row k"], log_probs: Float[Tensor, "*row k"]
) -> tuple[Integer[Tensor, "*row k"], Float[Tensor, "*row k"]]:
    """Entries with the same id added into the first of them; the later ones become −1."""
    same = (ids[..., :, None] == ids[..., None, :]) & (ids >= 0)[..., None, :]
    total = log_probs[..., None, :].masked_fill(~same, -torch.inf).logsumexp(-1)
    repeated = same.tril(-1).any(-1)
    return ids.masked_fill(repeated, -1), total


@runtime_checkable
class RowLoss(Protocol):
    """A loss of every row's logits and its gradient by them, both in float32 (or wider), for a slice of the rows."""

    def __call__(
        self, logits: Float[Tensor, "row vocab"], rows: slice
    ) -> tuple[Float[Tensor, "row"], Float[Tensor, "row vocab"]]:
        """The loss unreduced; the gradient is the caller's to write on."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """−log p of the targets, nats."""

    targets: Integer[Tensor, "row"]

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """p − onehot is the gradient."""
        log_probs, at = logits.log_softmax(-1), self.targets[rows, None].long()
        nll = -log_probs.gather(-1, at)
        return nll[:, 0], log_probs.exp_().scatter_add_(-1, at, torch.full_like(nll, -1.0))


@dataclass(frozen=True)
class FullKL:
    """τ² · KL(teacher ‖ student) at temperature τ over the whole vocabulary, from the teacher's final states.

    The teacher's head is in the dtype of its states. Of vocabularies that are padded to different sizes the first `cut`
    words are compared, as distributions over these alone.
    """

    head: Head
    states: Float[Tensor, "row width"]
    temperature: float | int = 1.0
    cut: int | None = None

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """τ · (p_student − p_teacher) is the gradient."""
        theirs = wide(self.head.logits(self.states[rows]))[:, : self.cut]
        teacher = (theirs / self.temperature).log_softmax(-1)
        student = (logits[:, : self.cut] / self.temperature).log_softmax(-1)
        probability = teacher.exp()
        divergence = (probability * (teacher - student)).sum(-1) * self.temperature**2
        gradient = torch.zeros_like(logits)
        gradient[:, : self.cut] = student.exp_().sub_(probability).mul_(self.temperature)
        return divergence, gradient


@dataclass(frozen=True)
class TopKL:
    """`logit_kd_loss`, whose gradient autograd forms."""

    ids: Integer[Tensor, "row k"]
    log_probs: Float[Tensor, "row k"]
    mask: Shaped[Tensor, "row"]
    temperature: float | int = 1.0

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Loss and gradient."""
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            loss = logit_kd_loss(logits, self.ids[rows], self.log_probs[rows], self.mask[rows], self.temperature)
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
        return loss.detach(), gradient


@dataclass(frozen=True)
class Mixed:
    """Several losses of the same rows, each with a share per row."""

    parts: Sequence[tuple[RowLoss, Float[Tensor, "row"]]]

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Sums of shares · loss, and of shares · gradient."""
        total, gradient = logits.new_zeros(len(logits)), torch.zeros_like(logits)
        for loss, shares in self.parts:
            each, by_logits = loss(logits, rows)
            share = shares[rows].to(logits)
            total, gradient = total + each * share, gradient.add_(by_logits * share[:, None])
        return total, gradient


def row_nll(head: Head, states: Float[Tensor, "row width"], targets: Integer[Tensor, "row"]) -> Float[Tensor, "row"]:
    """−log p of each target with its graph, for losses that are no sums of rows; logits are made again for the gradient."""
    cast = head.cast(states.dtype)

    def piece_nll(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(wide(cast.logits(states)), targets.long(), reduction="none")

    pieces = [
        checkpoint(piece_nll, states[piece], targets[piece], use_reentrant=False)
        for piece in head.pieces(states, LEAST)
    ]
    return torch.cat(pieces) if pieces else states.new_zeros(0)


def head_losses(
    head: Head,
    states: Float[Tensor, "row width"],
    losses: Mapping[str, tuple[RowLoss, Float[Tensor, "row"]]],
    weights: Mapping[str, float],
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Losses on the head's logits without ever holding (row × vocabulary): the gradient is formed in the forward pass.

    Every loss is given a weight per row: its value is the sum of row weight · loss (so 1/count for a mean, 0 where masked).
    Rows of weight 0 everywhere are best left out by the caller.

    Args:
        head: the student's; where its weight does not require a gradient, none is formed.
        states: the final states, in the dtype in which the head computes, with their graph.
        losses: name → loss and its row weights; they and what a loss holds are constants.
        weights: name → λ. A loss of weight 0 is computed and adds no gradient.

    Returns:
        The weighted sum of all values, whose backward reaches states and head (once; not twice differentiable), and each
        value without its graph.
    """
    names = list(losses)
    total, *values = _InPieces.apply(states, head.weight, head.bias, head, losses, weights)  # type: ignore[no-untyped-call]
    return total, dict(zip(names, values, strict=True))


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor | None, bias: Tensor | None, head: Head, losses: Any, weights: Any
    ) -> Any:
        """Values, and the gradients of their weighted sum, piece by piece."""
        number, cast, sources = wide(states[:0]).dtype, head.cast(states.dtype), (states, weight, bias)
        grads = [
            torch.zeros_like(x, dtype=states.dtype if x is states else number) if x is not None and needed else None
            for x, needed in zip(sources, ctx.needs_input_grad, strict=False)
        ]
        by_states, by_weight, by_bias = grads
        values = [torch.zeros((), dtype=number, device=states.device) for _ in losses]
        with torch.autocast(states.device.type, enabled=False):
            for piece in head.pieces(states, 1 if by_weight is None else LEAST):
                raw = cast.raw(states[piece])
                logits, gradient = wide(cast.finished(raw)), None
                for value, (name, (loss, row_weights)) in zip(values, losses.items(), strict=True):
                    each, by_logits = loss(logits, piece)
                    shares = row_weights[piece].to(number)
                    value += (each * shares).sum()
                    if weights[name] != 0 and any(ctx.needs_input_grad):
                        by_logits = by_logits.mul_((weights[name] * shares)[:, None])
                        gradient = by_logits if gradient is None else gradient.add_(by_logits)
                if gradient is None:
                    continue
                if head.softcap is not None:
                    gradient.mul_(1 - (logits / head.softcap).square_())
                by_raw = (gradient if head.scale == 1 else gradient.mul_(head.scale)).to(raw.dtype)
                if by_states is not None:
                    by_states[piece] = by_raw if cast.weight is None else by_raw @ cast.weight
                if by_weight is not None:
                    by_weight.add_(by_raw.mT @ states[piece])
                if by_bias is not None:
                    by_bias.add_(by_raw.sum(0, dtype=number))
        ctx.grads, ctx.dtypes = grads, [None if x is None else x.dtype for x in sources]
        ctx.mark_non_differentiable(*values)
        ctx.set_materialize_grads(False)
        return sum(weights[name] * value for name, value in zip(losses, values, strict=True)), *values

    @staticmethod
    def backward(ctx: Any, by_total: Tensor | None, *_: Any) -> Any:
        """What the forward has formed, times what comes from above."""
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("head_losses: its backward runs once; call it again for a second gradient")
        if by_total is None:
            return (None,) * 6
        scaled = (None if g is None else g.mul_(by_total).to(d) for g, d in zip(grads, ctx.dtypes, strict=True))
        return (*scaled, None, None, None)


@dataclass(frozen=True)
class Schedule:
    """A loss weight over training: linear warm-up from 0, then constant, annealed to `final`, or stopped there.

    `warmup` and `until` are shares of all steps: the weight reaches `value` after `warmup` and `final` at `until`.
    """

    value: float | int = 1.0
    kind: Literal["constant", "linear", "cosine", "stop"] = "constant"
    warmup: float | int = 0.0
    final: float | int = 0.0
    until: float | int = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine", "stop"):
            raise ValueError(f"schedule kind must be constant, linear, cosine or stop; got {self.kind!r}")
        if not 0 <= self.warmup < self.until <= 1:
            raise ValueError(f"schedule needs 0 <= warmup < until <= 1; got warmup {self.warmup}, until {self.until}")

    def __call__(self, step: int, total: int) -> float:
        """The weight at `step` of `total` steps, both counted from 0 (the last step is total − 1)."""
        share = step / max(total, 1)
        if share < self.warmup:
            return self.value * share / self.warmup
        if self.kind == "constant" or (self.kind == "stop" and share < self.until):
            return float(self.value)
        if self.kind == "stop":
            return float(self.final)
        progress = min(1.0, (share - self.warmup) / (self.until - self.warmup))
        fall = progress if self.kind == "linear" else (1 - cos(pi * progress)) / 2
        return self.value + (self.final - self.value) * fall


class NonFiniteLossError(ArithmeticError):
    """A loss term is NaN or infinite; the message names step, term and layer."""


def check_finite(terms: Mapping[str, Tensor], step: int) -> None:
    """Raises `NonFiniteLossError` when a term is NaN or infinite.

    A term is a scalar or has the layer as its first axis; then the layers concerned are named.
    """
    if not terms or torch.stack([torch.isfinite(term.detach()).all() for term in terms.values()]).all():
        return
    for name, term in terms.items():
        bad = ~torch.isfinite(term.detach())
        if not bad.any():
            continue
        layers = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist() if term.ndim else []
        where = f" in layer {', '.join(map(str, layers))}" if layers else ""
        found = "NaN" if torch.isnan(term.detach()).any() else "Inf"
        raise NonFiniteLossError(
            f"step {step}: loss term {name!r} is {found}{where}. Lower the learning rate or the "
            "term's weight, or train in bf16 or fp32 if this is fp16"
        )

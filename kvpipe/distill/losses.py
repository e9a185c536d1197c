"""Losses, unreduced: one number per example and position, 0 where masked (spec 3.8).

The training loss is ``CE + λ_K · L_K + λ_V · L_V``. Everything here is a pure function; weights come from `Schedule`.
All losses are computed in float32, or in float64 where an input is. A batch may come in parts (micro-batches,
processes): a part's loss is its `masked_sum` over the count of the whole batch, scaled by `pooled_std` of all parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Integer, Shaped
from torch import Tensor
from torch.nn import functional as F

from kvpipe.models.likelihood import wide


def kv_loss(
    student: Float[Tensor, "*layer batch head time dim"],
    target: Float[Tensor, "*layer batch head time dim"],
    mask: Shaped[Tensor, "batch time"],
    kind: Literal["mse", "smooth_l1"] = "mse",
    scale: Literal["std"] | Tensor | None = None,
) -> Float[Tensor, "batch time"]:
    """Squared or smooth-L1 (β = 1) distance of caches, averaged over layer, head and dim.

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
    kind: Literal["mse", "smooth_l1"] = "mse",
    scale: Literal["std"] | Tensor | None = None,
) -> Float[Tensor, "*layer batch time"]:
    """`kv_loss` of each layer by itself, for the log and for `check_finite`."""
    hidden = rearrange(mask == 0, "batch time -> batch 1 time 1")
    # Masked before anything else: 0 · NaN is NaN, in the backward pass too.
    residual = (wide(student) - wide(target)).masked_fill(hidden, 0)
    if isinstance(scale, Tensor) or scale == "std":
        std = scale if isinstance(scale, Tensor) else target_std(target, mask)
        residual = residual / torch.where(std > 0, std, 1.0)[..., None, None, None, None]
    elif scale is not None:
        raise ValueError(f"scale must be None or 'std'; got {scale!r}")
    if kind == "mse":
        loss = residual.square()
    elif kind == "smooth_l1":
        loss = F.smooth_l1_loss(residual, torch.zeros_like(residual), reduction="none")
    else:
        raise ValueError(f"kind must be 'mse' or 'smooth_l1'; got {kind!r}")
    return reduce(loss, "... batch head time dim -> ... batch time", "mean")


@torch.no_grad()
def target_moments(
    target: Float[Tensor, "*layer batch head time dim"], mask: Shaped[Tensor, "batch time"]
) -> Float[Tensor, "3 *layer"]:
    """Count, mean and summed squared deviation of each layer's target over the unmasked positions, heads and dims."""
    shown = rearrange(mask != 0, "batch time -> batch 1 time 1")
    axes = (-4, -3, -2, -1)
    values = wide(target)
    count = shown.sum() * target.shape[-3] * target.shape[-1]
    mean = values.masked_fill(~shown, 0).sum(axes) / count.clamp(min=1)
    centred = (values - mean[..., None, None, None, None]).masked_fill(~shown, 0)
    return torch.stack([count.to(mean).expand_as(mean), mean, centred.square().sum(axes)])


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

    student_log, teacher_log = log_relation(student, "student"), log_relation(teacher, "teacher")
    gap = (teacher_log - student_log).masked_fill(~allowed, 0)
    divergence = reduce(teacher_log.exp() * gap, "batch relation query key -> batch relation query", "sum")
    return divergence.mean(1).masked_fill(~shown, 0)


def logit_kd_loss(
    student_logits: Float[Tensor, "batch time vocab"],
    top_ids: Integer[Tensor, "batch time k"],
    top_logprobs: Float[Tensor, "batch time k"],
    mask: Shaped[Tensor, "batch time"],
    temperature: float | int = 1.0,
) -> Float[Tensor, "batch time"]:
    """KL(teacher ‖ student) over the teacher's top tokens that the student has too, and one bucket for all the rest.

    `top_ids` are *student* ids, −1 where the teacher's token has no student twin; `top_logprobs` are the teacher's
    log-probabilities at temperature 1. Logits and teacher entries at one position predict the same next token. What
    is not matched, on either side, is in the rest bucket, so both sides are proper distributions over k + 1 outcomes.
    Teacher tokens with the same twin add up. The temperature acts on these k + 1 outcomes of both sides, and the loss
    is multiplied by its square so that gradients keep their size (Hinton et al. 2015).
    """
    shown = mask != 0
    ids, teacher = _merged_twins(top_ids.long(), wide(top_logprobs))
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


def _merged_twins(
    ids: Integer[Tensor, "batch time k"], log_probs: Float[Tensor, "batch time k"]
) -> tuple[Integer[Tensor, "batch time k"], Float[Tensor, "batch time k"]]:
    """Entries with the same id added into the first of them; the later ones become −1."""
    same = (ids[..., :, None] == ids[..., None, :]) & (ids >= 0)[..., None, :]
    total = log_probs[..., None, :].masked_fill(~same, -torch.inf).logsumexp(-1)
    repeated = same.tril(-1).any(-1)
    return ids.masked_fill(repeated, -1), total


@dataclass(frozen=True)
class Schedule:
    """A loss weight over training: linear warm-up from 0, then constant, or annealed to `final`.

    `warmup` and `until` are shares of all steps: the weight reaches `value` after `warmup` and `final` at `until`.
    """

    value: float | int = 1.0
    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float | int = 0.0
    final: float | int = 0.0
    until: float | int = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine"):
            raise ValueError(f"schedule kind must be constant, linear or cosine; got {self.kind!r}")
        if not 0 <= self.warmup < self.until <= 1:
            raise ValueError(f"schedule needs 0 <= warmup < until <= 1; got warmup {self.warmup}, until {self.until}")

    def __call__(self, step: int, total: int) -> float:
        """The weight at `step` of `total` steps, both counted from 0 (the last step is total − 1)."""
        share = step / max(total, 1)
        if share < self.warmup:
            return self.value * share / self.warmup
        if self.kind == "constant":
            return float(self.value)
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
